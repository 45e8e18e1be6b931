"""Files that are no checkpoints of a supported format: what they are, and what to do with them."""

from pathlib import Path

from minikv_jax.errors import CheckpointError
from minikv_jax.models.wording import listed

_LFS_POINTER = b"version https://git-lfs.github.com/"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def refuse_other_contents(path: Path) -> None:
    """Pickles can run any code when opened, so they are refused unopened: by name, and by content under any name."""
    with open(path, "rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` in its folder.")
    beginnings = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    # The length of a safetensors header may begin with the same bytes (640 is 80 02); its JSON then follows at once.
    is_safetensors = start[4:9] == b"\0\0\0\0{"
    if path.suffix in PICKLE_SUFFIXES or (start.startswith(beginnings) and not is_safetensors):
        raise CheckpointError(
            f"{path} is a pickle or zip checkpoint, which can run code when opened and is never loaded. Convert it to "
            "safetensors (transformers: model.save_pretrained(folder)) and pass that folder."
        )


def refuse_other_folders(folder: Path) -> None:
    """Says what a folder holds instead of a whole model in this format."""
    found = sorted(entry.name for entry in folder.iterdir())
    if any(name.startswith(("adapter_config.", "adapter_model.")) for name in found):
        raise CheckpointError(
            f"{folder} holds a PEFT adapter ({listed(name for name in found if name.startswith('adapter_'))}), which "
            "is not applied here. Merge it into its base model (peft: "
            "model.merge_and_unload().save_pretrained(folder)) and pass that folder; if it is merged already, remove "
            "the adapter's files."
        )
    if "model.safetensors" in found or "model.safetensors.index.json" in found:
        return
    expected = f"{folder} has no model.safetensors and no model.safetensors.index.json"
    others = [name for name in found if name.endswith(".safetensors")]
    shards = [name for name in others if name.startswith("model-") and "-of-" in name]
    pickles = [name for name in found if name.endswith(PICKLE_SUFFIXES)]
    if shards:
        raise CheckpointError(
            f"{expected}, only the shards {listed(shards, 2)}. Download model.safetensors.index.json too: it says "
            "which shards belong together."
        )
    if any(name.startswith("consolidated") for name in others):
        raise CheckpointError(
            f"{expected}, only {listed(others, 2)}: Mistral's own format, whose tensors have other names and another "
            "order. Download the files model*.safetensors and config.json of the same repository."
        )
    if others:
        raise CheckpointError(f"{expected}, only {listed(others)}. If that is the whole model, rename it.")
    if gguf := [name for name in found if name.endswith(".gguf")]:
        raise CheckpointError(f"{expected}; pass the GGUF file itself: {folder / gguf[0]}")
    if pickles:
        raise CheckpointError(
            f"{expected}, only {listed(pickles)}: pickles can run code when opened and are never loaded. "
            "Convert them to safetensors (transformers: model.save_pretrained(folder)) and pass that folder."
        )
    raise CheckpointError(f"{expected}; it holds {listed(found) or 'nothing'}. Download the model again.")
