"""The configuration: what is accepted, what is refused, and that the refusal names file:line and what to do."""

from __future__ import annotations

import itertools
import typing
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivet.config import ALIASES, Config, DataConfig, ModelConfig, TrainingConfig
from trivet.configio import dump, keys, load, sections, template, to_dict
from trivet.errors import ConfigError
from trivet.methods import METHODS

KEYS = keys()


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """`write(text)` is the path of a config file with that text."""

    def file(text: str) -> Path:
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return file


def get(config: Config, name: str) -> Any:
    section, _, key = name.rpartition(".")
    return getattr(getattr(config, section) if section else config, key)


def refusal(path: Path | None, *overrides: str, **values: Any) -> str:
    """The message with which a config is refused."""
    with pytest.raises(ConfigError) as caught:
        load(path, overrides, values)
    return str(caught.value)


def options_of(kind: Any) -> tuple[Any, ...]:
    """The types that a key accepts."""
    return (kind,) if typing.get_origin(kind) in (list, dict) else typing.get_args(kind) or (kind,)


def another(name: str) -> Any:
    """A valid value of a key that is not its default."""
    field, kind = KEYS[name]
    if field.metadata["choices"]:
        choice = field.metadata["choices"][-1]
        return [choice] if typing.get_origin(kind) is list else choice
    options = options_of(kind)
    if bool in options:
        return not field.default
    if float in options:
        return 0.75
    if int in options:
        return 17
    if name == "method":
        return "pissa"
    return {"prompt": "question"} if typing.get_origin(kind) is dict else "something"


# -- the schema --------------------------------------------------------------------------------------------------------


def test_an_empty_config_is_the_defaults(write: Any) -> None:
    assert load() == load(write("")) == load(write("# nothing but a comment\n")) == load(write("data:\n")) == Config()


def test_the_defaults_are_the_ones_we_document() -> None:
    config = Config()
    assert (config.model.lora_rank, config.model.lora_alpha, config.model.target_modules) == (8, None, "all-linear")
    assert (config.training.batch_size, config.training.learning_rate, config.training.num_epochs) == (8, 3e-4, 3.0)
    assert (config.method, config.data.validation, config.data.loss_on) == ("lora", "auto", "responses")
    assert config.model.trust_remote_code is False


def test_configs_cannot_be_changed_in_place() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().model.lora_rank = 4  # type: ignore[misc]


@pytest.mark.parametrize("name", KEYS)
def test_every_key_is_documented_and_its_default_is_valid(name: str) -> None:
    field, _ = KEYS[name]
    assert len(field.metadata["help"].split()) >= 2
    assert get(load(values={name: get(Config(), name)}), name) == get(Config(), name)


@pytest.mark.parametrize("name", KEYS)
def test_every_key_can_be_set_in_its_section_and_as_an_override(name: str, write: Any) -> None:
    value = another(name)
    section, _, key = name.rpartition(".")
    text = yaml.safe_dump({section: {key: value}} if section else {key: value})
    assert get(load(write(text)), name) == value != get(Config(), name)
    assert get(load(None, [f"{name}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"]), name) == value


def test_the_config_of_the_readme_loads(write: Any) -> None:
    config = load(
        write(
            "model:\n  name: gpt2\n  lora_rank: 8\ntraining:\n  batch_size: 8\n  learning_rate: 3e-4\n  num_epochs: 3\n"
        )
    )
    training = TrainingConfig(batch_size=8, learning_rate=3e-4, num_epochs=3.0)
    assert config == Config(ModelConfig("gpt2", 8), DataConfig(), training)


# -- numbers, booleans, lists, nulls -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("3e-4", 3e-4),
        ("1e-4", 1e-4),
        ("1.e-4", 1e-4),
        (".5", 0.5),
        ("1E5", 1e5),
        ("+1e+2", 100.0),
        ("2", 2.0),
        ("5.0e-5", 5e-5),
    ],
)
def test_numbers_are_read_as_people_write_them(written: str, value: float, write: Any) -> None:
    for config in (
        load(write(f"training:\n  learning_rate: {written}\n")),
        load(None, [f"learning_rate={written}"]),
    ):
        assert config.training.learning_rate == value
        assert type(config.training.learning_rate) is float


def test_our_reading_of_numbers_stays_ours() -> None:
    assert yaml.safe_load("3e-4") == "3e-4"  # the resolver is on our loader, not on everybody's


@pytest.mark.parametrize("written", ['"3e-4"', "'3e-4'", "3e-4x", "three", "0x1p3", ".inf", "-.inf", ".nan", "true"])
def test_what_is_no_number_is_refused(written: str, write: Any) -> None:
    message = refusal(write(f"training:\n  learning_rate: {written}\n"))
    assert "c.yaml:2: training.learning_rate is a number or auto, not " in message


@pytest.mark.parametrize(("written", "value"), [("1000", 1000), ("1e3", 1000), ("1000.0", 1000), ("1_000", 1000)])
def test_whole_numbers(written: str, value: int, write: Any) -> None:
    steps = load(write(f"max_steps: {written}")).training.max_steps
    assert steps == value
    assert type(steps) is int


@pytest.mark.parametrize("written", ["8.5", "true", "'8'", ".inf", "1e400", "[8]"])
def test_what_is_no_whole_number_is_refused(written: str, write: Any) -> None:
    assert "model.lora_rank is a whole number, not " in refusal(write(f"model: {{lora_rank: {written}}}"))


def test_an_integer_too_large_for_a_float_is_refused_where_a_float_is_wanted() -> None:
    assert "is a number or auto, not 1000" in refusal(None, f"learning_rate=1{'0' * 400}")


@pytest.mark.parametrize(("written", "value"), [("true", True), ("True", True), ("false", False), ("no", False)])
def test_booleans(written: str, value: bool, write: Any) -> None:
    assert load(write(f"gradient_checkpointing: {written}")).training.gradient_checkpointing is value


@pytest.mark.parametrize("written", ["1", "0", "'true'", "null"])
def test_what_is_no_boolean_is_refused(written: str, write: Any) -> None:
    message = refusal(write(f"training: {{gradient_checkpointing: {written}}}"))
    assert "training.gradient_checkpointing is true or false, not " in message


def test_lists_and_nulls(write: Any) -> None:
    config = load(
        write(
            "model:\n  target_modules: [q_proj, v_proj]\ndata:\n  train:\n    - a.jsonl\n    - b.jsonl\n"
            "  validation: null\ntraining:\n  report_to: [tensorboard]\n"
        )
    )
    assert config.model.target_modules == ["q_proj", "v_proj"]
    assert config.data.train == ["a.jsonl", "b.jsonl"]
    assert config.data.validation is None
    assert config.training.report_to == ["tensorboard"]


def test_values_from_python_take_paths_and_tuples() -> None:
    config = load(values={"train": Path("a") / "b.jsonl", "target_modules": ("q", "v")})
    assert config.data.train == str(Path("a") / "b.jsonl")
    assert config.model.target_modules == ["q", "v"]


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_sets_the_key_it_stands_for_wherever_it_is_written(alias: str, write: Any) -> None:
    name = ALIASES[alias]
    value = yaml.safe_dump(another(name), default_flow_style=True).splitlines()[0]
    assert name in KEYS
    wanted = get(load(None, [f"{name}={value}"]), name)
    assert wanted != get(Config(), name)
    assert get(load(write(f"{alias}: {value}\n")), name) == wanted
    for section in sections():
        if f"{section}.{alias}" not in KEYS:  # evaluation.batch_size is a key of its own
            assert get(load(write(f"{section}:\n  {alias}: {value}\n")), name) == wanted


def test_batch_size_means_the_section_it_stands_in(write: Any) -> None:
    config = load(write("batch_size: 3\nevaluation:\n  batch_size: 5\n"))
    assert (config.training.batch_size, config.evaluation.batch_size) == (3, 5)


def test_keys_may_stand_at_the_top_level(write: Any) -> None:
    config = load(write("name: gpt2\ntrain: a.jsonl\nseed: 1\nresamples: 100\n"))
    assert (config.model.name, config.data.train) == ("gpt2", "a.jsonl")
    assert (config.training.seed, config.evaluation.resamples) == (1, 100)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("model:\n  lora_rank: 8\n  r: 8\n", (3, 2)),
        ("model:\n  r: 8\nlora_rank: 8\n", (3, 2)),
        ("r: 4\nlora_r: 8\n", (2, 1)),
        ("training:\n  lr: 1\n\n  learning_rate: 1\n", (4, 2)),
    ],
)
def test_a_key_and_its_alias_together_are_refused_with_both_lines(
    text: str, lines: tuple[int, int], write: Any
) -> None:
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}:{lines[0]}: ")
    assert f"which {path}:{lines[1]} sets too; keep one" in message


def test_a_key_and_its_alias_together_are_refused_in_python_too() -> None:
    message = refusal(None, learning_rate=1e-4, lr=1e-4)
    assert "argument lr" in message
    assert "argument learning_rate sets too" in message


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [("model:\n  name: a\n  name: b\n", 2, 3), ("model: {}\ndata: {}\nmodel: {}\n", 1, 3)],
)
def test_duplicates_are_refused_with_both_lines(text: str, first: int, second: int, write: Any) -> None:
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}:{second}: ")
    assert f"is set twice, first on line {first}" in message


@pytest.mark.parametrize(
    ("text", "line", "near"),
    [
        ("model:\n  lora_rnak: 8\n", 2, "model.lora_rank"),
        ("training:\n  batch_size: 8\n\n  learning_rte: 3e-4\n", 4, "training.learning_rate"),
        ("ouput_dir: x\n", 1, "output_dir"),
        ("data:\n  max_sequence_length: 8\n", 2, "data.max_length"),
        ("trainng:\n  batch_size: 8\n", 1, "data.train"),
        ("training:\n  model_name_or_pth: x\n", 2, "model.name"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(text: str, line: int, near: str, write: Any) -> None:
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}:{line}: unknown key ")
    assert f"did you mean {near}?" in message


def test_an_unknown_key_like_no_other_points_to_the_full_list(write: Any) -> None:
    message = refusal(write("zzz: 1\n"))
    assert "unknown key `zzz`" in message
    assert "`trivet init` shows every key" in message
    assert all(section in message for section in sections())


def test_a_real_key_under_a_section_that_is_none_is_refused() -> None:
    assert "unknown key `optimizer.lr`" in refusal(None, "optimizer.lr=1")


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("model:\n  name: 7\n", 2, "model.name is text or null, not 7 (int)"),
        ("output_dir: null\n", 1, "output_dir is text, not None"),
        ("model:\n  target_modules: {q: v}\n", 2, "model.target_modules is text or a list of texts, not {'q': 'v'}"),
        ("model:\n  target_modules: [1, 2]\n", 2, "a list of texts, not [1, 2]"),
        ("data:\n  columns: [a]\n", 2, "data.columns is a mapping of texts, not ['a']"),
        ("data:\n  columns: {prompt: 1}\n", 2, "data.columns is a mapping of texts"),
        ("data:\n  validation: true\n", 2, "data.validation is a number or text or a list of texts or null, not True"),
        ("training:\n  report_to: tensorboard\n", 2, "training.report_to is a list of texts, not 'tensorboard'"),
        ("data:\n  train: 2020-01-01\n", 2, "data.train is text or a list of texts or null"),
    ],
)
def test_wrong_types_are_refused_with_what_would_be_right(text: str, line: int, says: str, write: Any) -> None:
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}:{line}: ")
    assert says in message


def test_a_wrong_type_is_explained_with_the_help_text(write: Any) -> None:
    assert KEYS["training.num_epochs"][0].metadata["help"] in refusal(write("num_epochs: many\n"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "model: {task: casual-lm}",
            "model.task can't be 'casual-lm'; did you mean causal-lm? choices: auto, causal-lm",
        ),
        ("model: {dtype: fp32}", "choices: auto, float32, bfloat16, float16"),
        ("data: {on_bad_row: skp}", "did you mean skip?"),
        ("training: {lr_scheduler: polynomial}", "choices: cosine, linear"),
        ("training: {report_to: [tensorboard, mlflow]}", "can't be 'mlflow'"),
    ],
)
def test_wrong_choices_are_refused_with_the_right_ones(text: str, says: str, write: Any) -> None:
    assert says in refusal(write(text))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("lora_rank=0", "model.lora_rank must be at least 1, not 0"),
        ("lora_rank=-8", "must be at least 1, not -8"),
        ("lora_alpha=0", "model.lora_alpha must be above 0"),
        ("lora_dropout=-0.1", "must be at least 0"),
        ("lora_dropout=1", "model.lora_dropout must be below 1"),
        ("num_epochs=0", "training.num_epochs must be above 0"),
        ("warmup_ratio=1", "training.warmup_ratio must be below 1"),
        ("warmup_ratio=100", "training.warmup_ratio must be below 1"),
        ("data.validation=1.5", "data.validation must be below 1, not 1.5"),
        ("data.validation=0", "data.validation must be above 0"),
        ("seed=4294967296", "training.seed must be below 4294967296"),
        ("max_length=7", "data.max_length must be at least 8"),
        ("resamples=9", "evaluation.resamples must be at least 10"),
        ("max_steps=0", "training.max_steps must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused(setting: str, says: str) -> None:
    message = refusal(None, setting)
    assert message.startswith(f"override '{setting}': ")
    assert says in message


@pytest.mark.parametrize("setting", ["lora_rank=1", "lora_dropout=0.999", "warmup_ratio=0", "seed=4294967295"])
def test_values_at_the_edge_are_accepted(setting: str) -> None:
    assert load(None, [setting]) != Config()


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: [1\n", 2),
        ("model:\n\tname: x\n", 2),
        ("model:\n  name: 'x\n\n", 4),
        ("a: b: c\n", 1),
        ("model: {}\n---\ndata: {}\n", 2),
        ("model:\n  name: !!python/object/apply:os.getcwd []\n", 2),
        ("model:\n  name: a\n  revision: \x00\n", 3),
        ("model: *nowhere\n", 1),
    ],
)
def test_bad_yaml_is_refused_with_its_line(text: str, line: int, write: Any) -> None:
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}:{line}: not valid YAML: ")
    assert "\n" not in message


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b\n", "sequence"), ("just text\n", "scalar"), ("7\n", "scalar")])
def test_a_config_that_is_no_mapping_is_refused(text: str, kind: str, write: Any) -> None:
    assert f"c.yaml:1: a config is a mapping of sections such as `model:`, not a {kind}" in refusal(write(text))


@pytest.mark.parametrize("section", sections())
def test_a_section_that_is_no_mapping_is_refused(section: str, write: Any) -> None:
    message = refusal(write(f"method: lora\n{section}: gpt2\n"))
    assert f"c.yaml:2: `{section}:` is a section with keys such as " in message
    assert "not 'gpt2'" in message
    assert f"`{section}` is a section; set one of its keys, such as {section}." in refusal(None, f"{section}=gpt2")


def test_a_missing_file_is_refused_with_how_to_make_one(tmp_path: Path) -> None:
    message = refusal(tmp_path / "c.yaml")
    assert message == (
        f"config file {tmp_path / 'c.yaml'}: no such file; `trivet init {tmp_path / 'c.yaml'}` writes a commented one "
        "to start from"
    )


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xff\xfe\xfa")
    assert f"config file {path}: cannot be read as UTF-8 text" in refusal(path)
    assert f"config file {tmp_path}: cannot be read" in refusal(tmp_path)


# -- overrides ---------------------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file_and_the_last_one_wins(write: Any) -> None:
    path = write("training:\n  lr: 1e-3\n  max_steps: 10\n")
    config = load(path, ["training.learning_rate=2e-3", "training.max_steps=20", "max_steps=30"])
    assert (config.training.learning_rate, config.training.max_steps) == (2e-3, 30)


def test_overrides_take_lists_mappings_nulls_and_text_with_equals_signs() -> None:
    config = load(
        None,
        [
            "model.target_modules=[q_proj, v_proj]",
            "data.columns={prompt: question}",
            "data.validation=null",
            "model.lora_alpha=",
            "output_dir=runs/lr=3e-4",
        ],
    )
    assert config.model.target_modules == ["q_proj", "v_proj"]
    assert config.data.columns == {"prompt": "question"}
    assert config.data.validation is None
    assert config.model.lora_alpha is None
    assert config.output_dir == "runs/lr=3e-4"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.max_steps", "write key=value, for example training.max_steps=20"),
        ("=20", "write key=value"),
        ("data.train=[a", "the value is not valid YAML"),
        ("training.max_stps=20", "unknown key `training.max_stps`; did you mean training.max_steps?"),
        ("training.max_steps=many", "training.max_steps is a whole number or null, not 'many'"),
    ],
)
def test_bad_overrides_are_refused_and_named(override: str, says: str) -> None:
    message = refusal(None, override)
    assert message.startswith(f"override '{override}': ")
    assert says in message


def test_a_config_can_be_the_start_of_another() -> None:
    first = load(None, ["seed=1", "lora_rank=4"])
    assert load(None, ["lora_rank=2"], {"batch_size": 3}, start=first) == replace(
        first, model=replace(first.model, lora_rank=2), training=replace(first.training, batch_size=3)
    )


# -- writing -----------------------------------------------------------------------------------------------------------

#: Texts that YAML could take for something else, beside all others. PyYAML itself folds three exotic line breaks.
TEXT = st.one_of(
    st.text(st.characters(exclude_characters="\x85\u2028\u2029", exclude_categories=["Cs"]), max_size=40),
    st.sampled_from(["", "3e-4", "12e4567", "null", "~", "yes", "- a", "a: b", "#c", "1", "0x1", "2020-01-01", "a\nb"]),
    st.from_regex(r"[0-9]{1,3}[eE][0-9]{1,4}", fullmatch=True),
)


#: Methods as they may be written.
METHOD_FORMS: list[Any] = [
    *METHODS,
    {"update": "muon"},
    {"decompose": "gradient", "rank": {"name": "squeeze", "budget": "r2-equivalent"}, "update": "adamw"},
    {"rank": {"name": "pattern", "ranks": {"q_proj": 4, "mlp": 0}}, "update": {"name": "lora_plus", "ratio": 4}},
]


def values_of(name: str) -> st.SearchStrategy[Any]:
    """Valid values of a key, read off its type and bounds."""
    field, kind = KEYS[name]
    limits = field.metadata
    if name == "method":
        return st.sampled_from(METHOD_FORMS)
    if limits["choices"]:
        choice = st.sampled_from(limits["choices"])
        return st.lists(choice, max_size=3) if typing.get_origin(kind) is list else choice
    low = limits["at_least"] if limits["at_least"] is not None else limits["above"] or 0
    numbers = st.floats(
        low, limits["below"], exclude_min=limits["above"] is not None, exclude_max=limits["below"] is not None,
        allow_nan=False, allow_infinity=False,
    )  # fmt: skip
    made: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(int(low), int(limits["below"]) - 1 if limits["below"] else None),
        float: numbers,
        str: TEXT,
        type(None): st.none(),
        list[str]: st.lists(TEXT, max_size=3),
        dict[str, str]: st.dictionaries(TEXT, TEXT, max_size=3),
        Literal["auto"]: st.just("auto"),
    }
    return st.one_of([made[option] for option in options_of(kind)])


CONFIGS = st.fixed_dictionaries({}, optional={name: values_of(name) for name in KEYS})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONFIGS)
def test_dump_and_load_round_trip(tmp_path: Path, values: dict[str, Any]) -> None:
    config = load(values=values)
    path = tmp_path / "config.yaml"
    path.write_text(dump(config), encoding="utf-8", newline="\n")
    assert load(path) == config
    assert yaml.safe_load(dump(Config())) == to_dict(Config())  # plain YAML, which other tools read too


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONFIGS)
def test_a_template_with_values_loads_back(tmp_path: Path, values: dict[str, Any]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(template(**values), encoding="utf-8", newline="\n")
    assert load(path) == load(values=values)


def test_the_template_is_the_defaults_with_every_key_explained(write: Any) -> None:
    text = template()
    assert load(write(text)) == Config()
    lines = text.splitlines()
    for name, (field, _) in KEYS.items():
        at = next(
            i for i, line in enumerate(lines) if line.split(":")[0].strip() == field.name and in_section(lines, i, name)
        )
        assert field.metadata["help"] in lines[at - 1]
        assert all(choice in lines[at - 1] for choice in field.metadata["choices"])


def in_section(lines: list[str], at: int, name: str) -> bool:
    """Whether line `at` stands in the section that a dotted name starts with."""
    heads = [line.rstrip(":") for line in lines[: at + 1] if line.rstrip(":") in sections()]
    return (heads[-1] if heads else "") == name.rpartition(".")[0]


def test_no_two_keys_of_different_sections_could_be_confused_at_the_top_level() -> None:
    """A bare key means one section only; where two have it, an alias says which."""
    bare = sorted(name.rpartition(".")[2] for name in KEYS)
    twice = {key for key, group in itertools.groupby(bare) if len(list(group)) > 1}
    assert twice <= set(ALIASES)
