"""The script that starts a command under `torchrun` again and again until it is done: the part all launchers share.

`torchrun` is started anew instead of restarting its processes itself: over gloo a second start inside one `torchrun`
meets the addresses of the first. Its exit code says nothing, so each process leaves its own behind; see
`smalti/cli/launched.py`.
"""

import shlex
from collections.abc import Mapping, Sequence

_NODE = r"""
# One start of torchrun on one machine. Its exit code says only that something ended, so each process leaves its own.
node() {
  local codes status=1 child="" stopped=0 said meeting code file
  codes=$(mktemp -d) || return 74
  # Only once: a second signal would make torchrun wait no longer.
  trap '[ "$stopped" = 1 ] || [ -z "$child" ] || kill -TERM "$child" 2>/dev/null; stopped=1' TERM INT USR1
  if [ "$NODES" = 1 ]; then
    meeting=(--standalone --nnodes 1)
  else
    meeting=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-id "$RENDEZVOUS" --rdzv-endpoint "$MASTER_ADDR:$PORT"
      --rdzv-conf "is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)")
  fi
  "${PYTHON:-python3}" -m torch.distributed.run "${meeting[@]}" --nproc-per-node "$PROCESSES" --max-restarts 0 \
    -m smalti.cli.launched "$codes" "${SMALTI[@]}" &
  child=$!
  [ "$stopped" = 0 ] || kill -TERM "$child" 2>/dev/null
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    status=$?
  done
  # A torchrun that was killed leaves its processes behind, and they would hold the run folder.
  for file in "$codes"/*.pid; do
    [ ! -f "$file" ] || kill -KILL "$(cat "$file")" 2>/dev/null
  done
  said=" $(cat "$codes"/*.code 2>/dev/null | tr '\n' ' ')"
  rm -rf "$codes"
  for code in 64 65 70 73; do
    case "$said" in *" $code "*) return "$code" ;; esac
  done
  [ "$status" != 0 ] || return 0
  case "$said" in *" 75 "*) return 75 ;; esac
  return 1
}
"""

_LOOP = r"""
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="$GRACE" # how long torchrun waits for the save before it kills
child=""
signal=""

say() { echo "launch: $*" >&2; }

# The first signal is passed on; the processes save at the end of their step.
forward() {
  [ -z "$signal" ] || return
  signal=$1
  say "got $signal, saving"
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap 'forward TERM' TERM
trap 'forward INT' INT
trap 'forward USR1' USR1

# $1 seconds, or until a signal.
pause() {
  sleep "$1" &
  child=$!
  [ -z "$signal" ] || kill "$child" 2>/dev/null
  wait "$child"
  kill "$child" 2>/dev/null
  child=""
}

failures=0
attempt=0
while :; do
  attempt=$((attempt + 1))
  before=$(progress)
  start &
  child=$!
  [ -z "$signal" ] || kill -TERM "$child" 2>/dev/null
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    status=$?
  done
  child=""
  case "$status" in
    0) say "finished"; exit 0 ;;
    64 | 65 | 70 | 73) say "stopped for good with exit code $status; its own message says why"; exit "$status" ;;
  esac
  if [ -n "$signal" ]; then
    say "stopped by $signal; the same script continues"
    stopped
    exit 75
  fi
  [ "$(progress)" = "$before" ] || failures=0
  failures=$((failures + 1))
  if [ "$failures" -gt "$RETRIES" ]; then
    say "ended with exit code $status, $failures times in a row without a step forward"
    [ "$status" = 75 ] && exit 75
    exit 1
  fi
  delay=$((BACKOFF << (failures < 6 ? failures - 1 : 5)))
  say "ended with exit code $status; again in $delay s ($failures of $RETRIES without a step forward)"
  pause "$delay"
  if [ -n "$signal" ]; then
    stopped
    exit 75
  fi
done
"""

_PROGRESS = {
    True: 'progress() { find "$OUT/checkpoints" -maxdepth 1 -name "step-[0-9]*" 2>/dev/null | sort | tail -n 1; }',
    False: 'progress() { find "$OUT" -type f 2>/dev/null | wc -l; }',
}


def commented(lines: Sequence[str]) -> str:
    """Lines as comments of a shell script or a YAML file; a line break inside one cannot end the comment."""
    return "".join(f"# {part}".rstrip() + "\n" for line in lines for part in line.splitlines() or [""])


def settings(values: Mapping[str, str | int | Sequence[str]]) -> str:
    """Assignments, each value quoted."""
    lines = []
    for name, value in values.items():
        words = shlex.quote(str(value)) if isinstance(value, str | int) else f"({shlex.join(value)})"
        lines.append(f"{name}={words}\n")
    return "".join(lines)


def restart_script(
    values: Mapping[str, str | int | Sequence[str]], *, checkpoints: bool, before: str, start: str, stopped: str
) -> str:
    """The loop, without its first line and comments.

    Args:
        values: SMALTI (the command's words), OUT, NODES, PROCESSES, PORT, RETRIES, BACKOFF and GRACE.
        checkpoints: progress is a newer checkpoint in OUT; otherwise any new file there.
        before: shell lines that say where this machine stands, if there are several: MASTER_ADDR, NODE_RANK.
        start: the shell command of one attempt.
        stopped: the shell command for when a signal has ended the run, after it was saved.
    """
    hooks = f"start() {{ {start}; }}\nstopped() {{ {stopped}; }}\n{_PROGRESS[checkpoints]}\n"
    return f"{settings(values)}\n{before}{_NODE}\n{hooks}{_LOOP}"
