"""What a person gets wrong, and what the command line answers: the exit code, one `error:` that names the input and
what to do, no traceback, and nothing written."""

from __future__ import annotations

import shlex
import shutil
import sys

import pytest

from process import trivet
from world import Case, World, both, change, check, damage, here, labelled, rows

TRAIN = "train config.yaml"
ABSENT = "cuda" if sys.platform == "darwin" else "mps"


def only_bin(world: World) -> None:
    folder = world.adapter()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def corrupt(world: World) -> None:
    weights = world.copy_model("gpt2") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def pickled(world: World) -> None:
    folder = world.copy_model("gpt2")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")


def old_run(world: World) -> None:
    shutil.copytree(world.run, world.cwd / "runs" / "a")


def unfinished_run(world: World) -> None:
    old_run(world)
    (world.cwd / "runs" / "a" / "result.json").unlink()
    shutil.rmtree(world.cwd / "runs" / "a" / "adapter")


def other_folder(world: World) -> None:
    (world.cwd / "runs" / "a").mkdir(parents=True)
    world.write("runs/a/thesis.txt", "years of work")


def occupied(world: World) -> None:
    (world.cwd / "merged").mkdir()
    world.write("merged/thesis.txt", "years of work")


CASES = [
    # -- the command and the config: nothing heavy is imported before these are refused
    Case("no arguments", "train", 2, ("Missing argument",), process=True),
    Case("unknown verb", "tran config.yaml", 2, ("No such command 'tran'", "'train'"), process=True),
    Case("unknown option", "train config.yaml --resum", 2, ("No such option: --resum", "--resume")),
    Case("missing config", "train c.yaml", 2, ("c.yaml: no such file", "trivet init c.yaml"), process=True),
    Case("config is a folder", "train .", 2, ("config file .: cannot be read",)),
    Case("two configs", "train config.yaml other.yaml", 2, ("one config file at most", "key=value")),
    Case("bad YAML", TRAIN, 2, ("config.yaml:4: not valid YAML",), change("lora_rank: 2", "lora_rank: [2")),
    Case("tab", TRAIN, 2, ("config.yaml:3: not valid YAML",), change("  lora_rank", "\tlora_rank"), process=True),
    Case("unknown key", TRAIN, 2, ("config.yaml:3", "did you mean model.lora_rank?"), change("rank", "rnk"),
         process=True),
    Case("wrong type", TRAIN, 2, ("config.yaml:9", "a whole number"), change("batch_size: 4", "batch_size: four")),
    Case("wrong choice", TRAIN, 2, ("config.yaml:4", "float32"), change("float32", "float31")),
    Case("out of range", TRAIN, 2, ("config.yaml:3", "at least 1"), change("lora_rank: 2", "lora_rank: 0")),
    Case("alias twice", TRAIN, 2, ("config.yaml:4", "config.yaml:3 sets too"), change("  dtype", "  r: 2\n  dtype")),
    Case("bad override", f"{TRAIN} lora_rank=x", 2, ("override 'lora_rank=x'", "a whole number")),
    Case("override of nothing", f"{TRAIN} optimizer=sgd", 2, ("override 'optimizer=sgd'", "unknown key")),
    Case("validation share", f"{TRAIN} validation=1.5", 2, ("data.validation must be below 1", "share of train")),
    Case("unknown logger", f"{TRAIN} report_to=[tensorbord]", 2, ("report_to", "did you mean tensorboard?")),
    Case("infinite rate", f"{TRAIN} lr=.inf", 2, ("training.learning_rate is a number",)),
    Case("init over a file", "init config.yaml", 2, ("config.yaml: exists already", "--force"), process=True),
    Case("init over a folder", "init . --force", 2, (".: is a folder", "config.yaml")),
    Case("no such adapter", "evaluate nowhere", 2, ("adapter nowhere: no such folder",)),
    Case("adapter is a file", "evaluate train.jsonl", 2, ("adapter train.jsonl:",)),
    Case("nothing to answer", "generate RUN", 2, ("nothing to answer", "--prompt"), process=True),
    Case("unknown dtype", "merge RUN merged --dtype fp32", 2, ("--dtype fp32", "float32")),
    Case("merge onto a folder", "merge RUN merged", 2, ("merged: exists already", "--overwrite"), occupied),
    Case("merge onto a file", "merge RUN train.jsonl", 2, ("train.jsonl: is a file", "name a folder")),
    Case("export onto a folder", "export RUN merged", 2, ("merged: exists already", "--overwrite"), occupied),
    # -- the run folder
    Case("run exists", TRAIN, 2, ("runs/a: holds a finished run", "--overwrite"), old_run, process=True),
    Case("run unfinished", TRAIN, 2, ("runs/a: holds an unfinished run", "--resume"), unfinished_run),
    Case("finished resumed", f"{TRAIN} --resume", 2, ("runs/a: is already finished", "--overwrite"), old_run),
    Case("resumed otherwise", f"{TRAIN} lora_rank=4 --resume", 2, ("model.lora_rank (2 then, 4 now)",), unfinished_run),
    Case("nothing to resume", f"{TRAIN} --resume", 2, ("runs/a: there is no run to resume", "leave out --resume")),
    Case("resume and overwrite", f"{TRAIN} --resume --overwrite", 2, ("give one of them",)),
    Case("output is a file", f"{TRAIN} output_dir=train.jsonl", 2,
         ("output_dir train.jsonl:", "train.jsonl is a file", "name a folder")),
    Case("output under a file", f"{TRAIN} output_dir=train.jsonl/run", 2, ("output_dir train.jsonl/run", "is a file")),
    Case("output holds other files", TRAIN, 2, ("runs/a: holds files but no run",), other_folder),
    Case("other files overwritten", f"{TRAIN} --overwrite", 2, ("runs/a: holds files but no run",), other_folder),
    Case("output is here", f"{TRAIN} output_dir=. --overwrite", 2, ("output_dir .: is the working folder",)),
    Case("no output", f"{TRAIN} output_dir=", 2, ("output_dir is text",)),
    # -- data
    Case("no data", f"{TRAIN} train=null", 2, ("data.train is not set",)),
    Case("missing data", f"{TRAIN} train=data/rows.jsonl", 2, ("data/rows.jsonl: no such file",), process=True),
    Case("missing test data", f"{TRAIN} test=test.csv", 2, ("data file test.csv: no such file",)),
    Case("data is a folder", f"{TRAIN} train=.", 2, ("is a folder; name its files",)),
    Case("unknown kind of file", f"{TRAIN} train=config.yaml", 2, ("config.yaml: unknown kind of file", ".jsonl")),
    Case("data hub id", f"{TRAIN} train=owner/rows", 2, ("data owner/rows", "`docstrings` needs no hub")),
    Case("empty data", TRAIN, 1, ("train.jsonl: no rows; the file is empty",), rows()),
    Case("bad JSON", TRAIN, 1, ("train.jsonl:2: not valid JSON", "on_bad_row: skip"),
         rows('{"prompt": "a", "completion": "b"}', '{"prompt": "a",'), process=True),
    Case("not UTF-8", TRAIN, 1, ("train.jsonl:1: not UTF-8 text", "save the file as UTF-8"),
         lambda w: (w.cwd / "train.jsonl").write_bytes(b'{"text": "\xff"}\n')),
    Case("not gzip", f"{TRAIN} train=t.jsonl.gz", 1, ("t.jsonl.gz: cannot be read",), rows("{}", file="t.jsonl.gz")),
    Case("not parquet", f"{TRAIN} train=t.parquet", 1, ("t.parquet: not a valid parquet",),
         rows("x", file="t.parquet")),
    Case("wrong columns", TRAIN, 1, ("columns question, answer fit no format", "data.columns"),
         rows('{"question": "a", "answer": "b"}')),
    Case("wrong mapping", f"{TRAIN} 'columns={{prompt: frage}}'", 1, ("train.jsonl:1", "`prompt` to `frage`")),
    Case("empty completion", TRAIN, 1, ("train.jsonl:2: column `completion` is empty", "on_bad_row: skip"),
         rows('{"prompt": "a", "completion": "b"}', '{"prompt": "a", "completion": " "}')),
    Case("missing column", TRAIN, 1, ("train.jsonl:3: column `completion` is missing",),
         rows(*['{"prompt": "a", "completion": "b"}'] * 2, '{"prompt": "a"}')),
    Case("all rows bad", f"{TRAIN} on_bad_row=skip", 1, ("train.jsonl: no rows (skipped 2",), rows("{", "[]")),
    Case("one class", TRAIN, 1, ("train.jsonl: only one label (yes)", "at least two"), rows(*labelled(["yes"] * 4))),
    Case("label is no number", TRAIN, 1, ("train.jsonl:3: column `label` is 'high'", "a finite number"),
         both(change("lora_rank: 2", "task: regression"), change("train.jsonl", "train.jsonl\n  format: regression"),
              rows(*labelled([0.5, 1.5, "high", 2.5])))),
    Case("unseen label", f"{TRAIN} test=t.jsonl", 1,
         ("t.jsonl:2: label 'c' does not occur in the training data (a, b)",),
         both(rows(*labelled(["a", "b"] * 12)), rows(*labelled(["a", "c"]), file="t.jsonl"))),
    Case("test rows of another kind", f"{TRAIN} test=t.jsonl", 1, ("t.jsonl", "does not suit task causal-lm"),
         rows(*labelled(["a", "b"]), file="t.jsonl")),
    # -- the model
    Case("no model", f"{TRAIN} name=null", 2, ("model.name is not set",)),
    Case("no such folder", f"{TRAIN} name=./models/x", 2, ("model ./models/x: no such folder",)),
    Case("no such hub model", f"{TRAIN} name=owner/x", 2, ("model owner/x: no such local folder", "model hub"),
         process=True),
    Case("no config.json", f"{TRAIN} name=runs", 1, ("model runs: the folder has no config.json",),
         lambda w: (w.cwd / "runs").mkdir()),
    Case("model is a file", f"{TRAIN} name=train.jsonl", 1, ("model train.jsonl: a single file is read only as GGUF",)),
    Case("corrupt weights", TRAIN, 1, ("model model: can't be loaded",), corrupt, process=True),
    Case("pickled weights", TRAIN, 1, ("model model: can't be loaded",), pickled),
    Case("encoder that shall write", TRAIN, 1, ("model model (bert) is no causal language model", "another model"),
         lambda w: w.copy_model("bert")),
    Case("wrong task", f"{TRAIN} task=seq2seq", 1, ("(gpt2) is no encoder-decoder", "causal-lm")),
    Case("unknown target", f"{TRAIN} target_modules=[q_prj]", 2,
         ("model.target_modules ['q_prj']", "Linear layers of this model: c_attn, c_fc, c_proj")),
    Case("no target", f"{TRAIN} target_modules=[]", 2, ("model.target_modules []",)),
    Case("unknown method", f"{TRAIN} method=lorra", 2, ("method 'lorra' is not known", "did you mean lora?")),
    Case("no such template", f"{TRAIN} chat_template=chat.jinja", 2, ("data.chat_template chat.jinja", "readable")),
    Case("no such device", f"{TRAIN} device={ABSENT}", 2, (f"model.device {ABSENT}: this machine has none",)),
    Case("patience without rows", f"{TRAIN} validation=null early_stopping_patience=2", 2, ("set data.validation",)),
    Case("logger not installed", f"{TRAIN} --overwrite report_to=[wandb]", 2, ("wandb is not installed", "pip install"),
         old_run),
    # -- what was trained
    Case("no adapter_config.json", "evaluate adapter", 1, ("adapter adapter: has no adapter_config.json",),
         lambda w: (w.adapter() / "adapter_config.json").unlink()),
    Case("bad adapter_config.json", "evaluate adapter --data train.jsonl", 1, ("adapter_config.json: can't be read",),
         damage("adapter_config.json", 20)),
    Case("bad trivet.json", "evaluate adapter --data train.jsonl", 1, ("trivet.json: can't be read",),
         damage("trivet.json", 20)),
    Case("trivet.json is a list", "generate adapter -p hi", 1, ("trivet.json: can't be read",),
         lambda w: (w.adapter() / "trivet.json").write_text("[1]")),
    Case("bad result.json", "evaluate runs/a --no-generate", 1, ("runs/a/result.json: can't be read",),
         lambda w: [old_run(w), w.write("runs/a/result.json", "{")]),
    Case("result.json is a list", "evaluate runs/a --no-generate", 1, ("runs/a/result.json: can't be read",),
         lambda w: [old_run(w), w.write("runs/a/result.json", "[1]")]),
    Case("bad config of a run", f"{TRAIN} --resume", 2, ("runs/a/config.yaml:1: unknown key",),
         lambda w: [unfinished_run(w), w.write("runs/a/config.yaml", "modle: {}")]),
    Case("bad template", f"{TRAIN} chat_template=bad.jinja", 1, ("train.jsonl:1: the chat template refuses the row",),
         lambda w: w.write("bad.jinja", "{% for x %}")),
    Case("truncated weights", "generate adapter -p hi", 1,
         ("adapter adapter: adapter_model.safetensors can't be read, it is damaged",),
         damage("adapter_model.safetensors", 500), process=True),
    Case("weights only as .bin", "merge adapter merged", 1, ("has no adapter_model.safetensors", "pickles"), only_bin),
    Case("other base model", "generate adapter -p hi --base-model LLAMA", 1, ("adapter adapter: does not fit",),
         lambda w: w.adapter()),
    Case("unfinished run", "generate runs/a -p hi", 1, ("run runs/a: has no adapter yet", "--resume"), unfinished_run),
    Case("unknown export", "export RUN out --format gguf", 2, ("'gguf' is not known", "native, portable")),
    Case("no data to evaluate", "evaluate adapter", 2, ("does not name its data; pass --data",), lambda w: w.adapter()),
    Case("missing evaluation data", "evaluate RUN --data t.jsonl", 2, ("data file t.jsonl: no such file",)),
    Case("evaluation rows of another kind", "evaluate RUN --data t.jsonl", 1, ("t.jsonl", "does not suit"),
         rows(*labelled(["a", "b"]), file="t.jsonl")),
    Case("output under a file of rows", "evaluate RUN --data train.jsonl --output train.jsonl/x.json", 2,
         ("--output train.jsonl/x.json: lies under a file",)),
    Case("output is no file", "evaluate RUN --data train.jsonl --output .", 2, ("--output .: is a folder",)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong_input(
    case: Case, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case.arrange(world)
    before, run_before = world.state(), World(world.run, world.tiny, world.run).state()
    places = {"RUN": str(world.run), "LLAMA": str(world.tiny("llama"))}
    words = [places.get(word, word) for word in shlex.split(case.command)]
    if case.process:
        done = trivet(world.cwd, words)
        code, stderr = done.returncode, done.stderr
    else:
        code, stderr = here(world.cwd, words, monkeypatch), capsys.readouterr().err
    check(code, stderr, case.code, case.says)
    assert world.state() == before
    assert World(world.run, world.tiny, world.run).state() == run_before


def test_overwriting_a_run_keeps_what_is_not_of_the_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old_run(world)
    world.write("runs/a/thesis.txt", "years of work")
    (world.cwd / "runs/a/checkpoints/checkpoint-9").mkdir()
    before = world.state()
    assert here(world.cwd, ["train", "config.yaml", "--overwrite", "seed=7"], monkeypatch) == 0
    after = world.state()
    assert after["runs/a/thesis.txt"] == before["runs/a/thesis.txt"]
    assert after["runs/a/result.json"] != before["runs/a/result.json"]
    assert "runs/a/checkpoints/checkpoint-9" not in after


# -- a full disk -------------------------------------------------------------------------------------------------------


FULL = [
    Case("checkpoint", TRAIN, 1, ("runs/a", "full")),
    Case("overwriting", f"{TRAIN} --overwrite", 1, ("runs/a", "full"), old_run),
    Case("merge in the place of another", "merge RUN merged --overwrite", 1, ("merged", "full"), occupied),
    Case("export", "export RUN exported --format native", 1, ("exported", "full")),
    Case("portable export", "export RUN exported", 1, ("exported", "full")),
    Case("init", "init new.yaml", 1, ("new.yaml", "full")),
    Case("evaluate", "evaluate runs/a --data train.jsonl --max-rows 4 --no-generate", 1, ("runs/a/result.json", "full"),
         old_run),
]  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files by RLIMIT_FSIZE, as Linux counts it")
@pytest.mark.parametrize("case", FULL, ids=lambda case: case.name)
def test_full_disk(case: Case, world: World) -> None:
    case.arrange(world)
    before = world.state()
    words = [str(world.run) if word == "RUN" else word for word in shlex.split(case.command)]
    done = trivet(world.cwd, words, file_size=3000)
    check(done.returncode, done.stderr, case.code, case.says)
    after = world.state()
    after.pop("runs", None)
    before.pop("runs", None)
    if case.name == "overwriting":  # the old run is gone, as asked for, and nothing of the new one is there
        assert {name for name in before if name.startswith("runs/a")} == before.keys() - after.keys()
    else:
        assert after == before
