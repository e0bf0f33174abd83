"""Backbones as users of huggingface_hub know them: `save_pretrained`, `from_pretrained`, `push_to_hub`.

What is written is the format of `smalti.models.files` and a model card. Nothing here touches the network unless it is
asked for a repository, and the hub's library is imported only then.
"""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from smalti.config import did_you_mean
from smalti.errors import CheckpointError, ConfigError
from smalti.models.base import BackboneConfig

T = TypeVar("T")

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class Pretrained(nn.Module):
    """Base of every backbone: a network that can store itself and be found again. It adds no tensors and no forward."""

    # What was stored beside the weights (diffusion settings, class names), and is stored with them again.
    stored_with: Mapping[str, Any] = _NOTHING
    card_name: ClassVar[str] = "README.md"

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        commit_message: str = "Push model using huggingface_hub.",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str | None:
        """Write `config.json`, `model.safetensors` and a model card; a card that is there already stays.

        Args:
            save_directory: made if missing.
            repo_id: for `push_to_hub`, by default the folder's name.
            model_card_kwargs: entries of the card's head, such as license, datasets or tags.
            extra: stored beside the weights; None = what was stored with this model before.
            commit_message, private, token, branch, create_pr: as `push_to_hub`.

        Returns:
            What `push_to_hub` returns, None without it.

        Raises:
            SmaltiError: as `smalti.save_model`.
        """
        from smalti.models.files import save_model  # here, because it imports the table of backbones, and that this

        folder = save_model(Path(save_directory), self, extra=self.stored_with if extra is None else extra)
        card = folder / self.card_name
        if not card.exists():
            card.write_text(_card(self, model_card_kwargs or {}))
        if not push_to_hub:
            return None
        return self.push_to_hub(
            repo_id or folder.resolve().name,
            commit_message=commit_message,
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
            model_card_kwargs=model_card_kwargs,
            extra=extra,
        )

    @classmethod
    def from_pretrained(
        cls: type[T],
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> T:
        """As `smalti.from_pretrained`, for one kind of backbone.

        Raises:
            CheckpointError: the model is of another kind, or as there.
        """
        model = from_pretrained(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
            device=device,
            dtype=dtype,
        )
        if not isinstance(model, cls):
            raise CheckpointError(
                f"{pretrained_model_name_or_path} is a {type(model).__name__}, not a {cls.__name__}: load it with "
                f"{type(model).__name__}.from_pretrained or smalti.from_pretrained"
            )
        return model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push model using huggingface_hub.",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        allow_patterns: list[str] | str | None = None,
        ignore_patterns: list[str] | str | None = None,
        delete_patterns: list[str] | str | None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes, in one commit; the repository is made if missing.

        Args:
            repo_id: owner/name, or name for a repository of your own.
            token: of your account; None = the one you are logged in with.

        Returns:
            The commit's address. Errors of the hub come as its library raises them.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token, library_name="smalti")
        repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory(prefix="smalti-") as folder:
            self.save_pretrained(folder, model_card_kwargs=model_card_kwargs, extra=extra)
            commit = api.upload_folder(
                repo_id=repo_id,
                repo_type="model",
                folder_path=folder,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
                allow_patterns=allow_patterns,
                ignore_patterns=ignore_patterns,
                delete_patterns=delete_patterns,
            )
        return str(commit)


def from_pretrained(
    pretrained_model_name_or_path: str | Path,
    *,
    force_download: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Pretrained:
    """A stored model of any kind, in eval mode; its `config.json` says which.

    Args:
        pretrained_model_name_or_path: a model or run folder, or a repository `owner/name` on the Hugging Face hub.
        force_download, token, cache_dir, local_files_only, revision: as everywhere in huggingface_hub; without meaning
            for a folder.
        dtype: None = as stored.

    Raises:
        CheckpointError: there is no such model, or it is damaged, or not of smalti's format.
    """
    from smalti.models.files import CONFIG, WEIGHTS, check_document, load_model

    path = Path(pretrained_model_name_or_path)
    if not path.exists():
        name = str(pretrained_model_name_or_path)
        if not _REPOSITORY.fullmatch(name):
            raise CheckpointError(f"{name} is neither a folder nor a repository owner/name on the Hugging Face hub")
        fetch = _Repository(name, force_download, token, cache_dir, local_files_only, revision).fetch
        config = fetch(CONFIG)
        check_document(config, name)  # before gigabytes of something else arrive
        # One commit for both, also when the branch moves on between the two.
        fetch = _Repository(name, force_download, token, cache_dir, local_files_only, config.parent.name).fetch
        path = fetch(WEIGHTS).parent
    model = load_model(path, device=device, dtype=dtype)
    if not isinstance(model, Pretrained):
        raise TypeError(f"{type(model).__name__} is not built on Pretrained")
    return model


class _Repository:
    """Where files come from, asked for in one way."""

    def __init__(
        self,
        name: str,
        force_download: bool,
        token: str | bool | None,
        cache_dir: str | Path | None,
        local_files_only: bool,
        revision: str | None,
    ) -> None:
        self.name, self.force_download, self.token = name, force_download, token
        self.cache_dir, self.local_files_only, self.revision = cache_dir, local_files_only, revision

    def fetch(self, filename: str) -> Path:
        """The local copy of a file, fetched if it is not there."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(
                hf_hub_download(
                    self.name,
                    filename,
                    force_download=self.force_download,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    local_files_only=self.local_files_only,
                    revision=self.revision,
                    library_name="smalti",
                )
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise CheckpointError(
                f"there is no folder {self.name}, and no {filename} from the repository of that name ({reason})"
            ) from error


def _card(model: Pretrained, head: Mapping[str, Any]) -> str:
    """A model card: what the hub reads, and how to use the model."""
    import yaml

    config, parameters = model.config, sum(p.numel() for p in model.parameters())
    assert isinstance(config, BackboneConfig)
    known = ("language", "license", "license_name", "license_link", "pipeline_tag", "datasets", "metrics", "base_model")
    own = {"library_name": "smalti", "tags": ["smalti", "diffusion", config.kind]}
    for name in head:
        if name not in (*known, "tags"):
            raise ConfigError(f"model_card_kwargs: unknown entry {name!r}{did_you_mean(name, (*known, 'tags'))}")
    tags = [*own["tags"], *(tag for tag in head.get("tags", ()) if tag not in own["tags"])]
    front = yaml.safe_dump(own | dict(head) | {"tags": tags}, sort_keys=False)
    rows, columns = config.sample_size
    classes = f"{config.num_classes} classes" if config.num_classes else "no classes"
    return f"""---
{front}---

# {type(model).__name__}, {parameters:,} parameters

A diffusion backbone for latents or images of {config.in_channels} x {rows} x {columns}, {classes}, stored by
smalti as `config.json` and `model.safetensors`.

```python
import smalti

model = smalti.from_pretrained("owner/name")  # or the folder of this file
output = model(latents, timesteps, class_labels)
```
"""
