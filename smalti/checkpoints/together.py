"""Steps that the processes of a run take together: if one of them cannot, none goes on, and nobody waits for ever."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smalti.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NumericError,
    RunLockedError,
    SmaltiError,
    StorageError,
)
from smalti.storage.sealed import NewerFormatError
from smalti.world import World

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_KINDS: tuple[type[Exception], ...] = (
    NewerFormatError,
    CheckpointError,
    ConfigError,
    DataError,
    NumericError,
    RunLockedError,
    StorageError,
    SmaltiError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Together:
    """The processes of a run, and the process group they talk over (None = the default one)."""

    world: World
    group: "ProcessGroup | None" = None

    def step(self, each: Callable[[], Any], lead: Callable[[list[Any]], Any]) -> Any:
        """Every process does `each`; if all could, the first does `lead` with what came of it, in order of rank.

        Returns:
            What `lead` returned, on all of them; both speak in the types that JSON has.

        Raises:
            Exception: as `each` or `lead` did; where another process failed, an error of the same kind that names it.
        """
        if self.world.size == 1:
            return lead([each()])
        own, said = _attempt(each)
        answers = self.world.collect_objects(said, self.group)
        outcome: dict[str, Any] = {}
        if answers is not None:
            failed = [rank for rank, answer in enumerate(answers) if "kind" in answer]
            if failed:
                outcome = answers[failed[0]] | {"rank": failed[0]}
            else:
                own, outcome = _attempt(lambda: lead([answer["value"] for answer in answers]))
                outcome["rank"] = 0
        outcome = self.world.broadcast_object(outcome, self.group)
        if own is not None:
            raise own
        if "kind" in outcome:
            raise _error(outcome)
        return outcome["value"]


def _attempt(do: Callable[[], Any]) -> tuple[Exception | None, dict[str, Any]]:
    """What came of it, and the same in words for the others."""
    try:
        return None, {"value": do()}
    except Exception as error:  # noqa: BLE001  (told to the others, and raised again when they know)
        kind = next((kind.__name__ for kind in _KINDS if isinstance(error, kind)), "")
        return error, {"kind": kind, "message": str(error) if kind else f"{type(error).__name__}: {error}"}


def _error(outcome: dict[str, Any]) -> Exception:
    kinds = {kind.__name__: kind for kind in _KINDS}
    kind = kinds.get(outcome["kind"], SmaltiError)
    return kind(f"process {outcome['rank']} of the run failed: {outcome['message']}")
