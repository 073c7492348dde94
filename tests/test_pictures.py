"""Pictures: every cell where it belongs and in its colour; what a history holds is drawn, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trivet import pictures
from trivet.errors import ConfigError, StorageError
from trivet.pictures import Place, brief, heat_maps, kinds, place, rank_map, rank_path

LLAMA = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"]
MINILM = [
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
]  # fmt: skip


def pixels(path: Path) -> Any:
    """The picture, (height, width, 3), 0 to 1."""
    from matplotlib.image import imread

    return imread(path)[:, :, :3]


def has(image: Any, colour: str) -> bool:
    from matplotlib.colors import to_rgb

    return bool((np.abs(image - np.array(to_rgb(colour))).max(-1) < 0.02).any())


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.12.self_attn.q_proj", Place("model.layers", 12, "self_attn.q_proj")),
        ("encoder.layer.3.attention.self.query", Place("encoder.layer", 3, "attention.self.query")),
        ("h.4.attn.c_attn", Place("h", 4, "attn.c_attn")),
        ("decoder.block.5.layer.1.EncDecAttention.q", Place("decoder.block", 5, "layer.EncDecAttention.q")),
        ("model.layers.0.mlp.experts.17.down_proj", Place("model.layers", 0, "mlp.experts.down_proj")),
        ("blocks.2.mlp.0", Place("blocks", 2, "mlp.0")),
        ("lm_head", Place("", None, "lm_head")),
        ("pooler.dense", Place("", None, "pooler.dense")),
        ("projection.0", Place("", None, "projection.0")),
    ],
)
def test_place(name: str, found: Place) -> None:
    assert place(name) == found


def test_kinds_are_the_shortest_names_that_tell_modules_apart() -> None:
    names = [f"encoder.layer.{i}.{m}" for i in range(2) for m in MINILM] + ["pooler.dense"]
    called = kinds(names)
    assert list(called) == names
    for i in range(2):
        assert [called[f"encoder.layer.{i}.{m}"] for m in MINILM] == [
            "query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense",
        ]  # fmt: skip
    assert called["pooler.dense"] == "pooler.dense"


def test_kinds_name_the_stack_only_where_there_are_several() -> None:
    bart = ["model.encoder.layers.0.self_attn.q_proj", "model.decoder.layers.0.self_attn.q_proj",
            "model.decoder.layers.0.encoder_attn.q_proj"]  # fmt: skip
    assert list(kinds(bart).values()) == ["encoder q_proj", "decoder self_attn.q_proj", "decoder encoder_attn.q_proj"]
    assert list(kinds([bart[1], "lm_head"]).values()) == ["q_proj", "lm_head"]
    both = ["encoder.block.0.layer.1.Dense.wo", "decoder.block.0.layer.2.Dense.wo"]
    assert list(kinds(both).values()) == ["encoder wo", "decoder wo"]


# -- maps --------------------------------------------------------------------------------------------------------------


def cell(image: Any, row: int, column: int, top: float = 0.0, high: float = pictures._TALL) -> Any:
    """A cell's colour beside its number; `top` in inches below the first cell of the panel."""
    y = 150 * (pictures._TOP + top + (row + 0.15) * high)
    x = 150 * (pictures._LEFT + (column + 0.1) * pictures._WIDTH)
    return image[round(y), round(x)]


def colour(share: float) -> Any:
    return np.array(pictures._colours()(share))[:3]


def test_each_cell_has_its_rank_s_colour(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ranks = {f"model.layers.{i}.{m}": int(rng.integers(0, 17)) for i in range(30) for m in LLAMA}
    del ranks["model.layers.7.self_attn.v_proj"]
    rank_map(ranks, tmp_path / "ranks.png")
    image, most = pixels(tmp_path / "ranks.png"), max(ranks.values())
    for i in range(30):
        for j, module in enumerate(LLAMA):
            rank = ranks.get(f"model.layers.{i}.{module}")
            expected = np.ones(3) if rank is None else colour(rank / most)
            assert np.abs(cell(image, i, j) - expected).max() < 0.02, (i, module, rank)


def test_encoder_decoder_and_the_rest_have_maps_of_their_own(tmp_path: Path) -> None:
    ranks = {f"encoder.block.{i}.layer.0.SelfAttention.q": 4 for i in range(3)}
    ranks |= {
        f"decoder.block.{i}.layer.{j}.{m}.q": 8 for i in range(2) for j, m in enumerate(("SelfAttention", "Cross"))
    }
    rank_map(ranks | {"lm_head": 2}, tmp_path / "ranks.png")
    image = pixels(tmp_path / "ranks.png")
    labels = [1, len("SelfAttention.q"), len("lm_head")]
    below = [0.22 + 0.043 * n for n in labels]
    decoder = 3 * pictures._TALL + below[0]
    outside = decoder + 2 * pictures._TALL + below[1]
    for top, rows, columns, rank in ((0.0, 3, 1, 4), (decoder, 2, 2, 8), (outside, 1, 1, 2)):
        for row in range(rows):
            for column in range(columns):
                assert np.abs(cell(image, row, column, top) - colour(rank / 8)).max() < 0.02
    assert image.shape[0] == pytest.approx(150 * (pictures._TOP + outside + pictures._TALL + below[2]), abs=2)


def test_layers_of_one_cell_are_drawn_as_their_mean(tmp_path: Path) -> None:
    experts = {f"layers.0.experts.{i}.up": rank for i, rank in enumerate((2, 4, 6))}
    rank_map(experts | {"layers.0.attn.q": 8}, tmp_path / "ranks.png")
    image = pixels(tmp_path / "ranks.png")
    assert np.abs(cell(image, 0, 0) - colour(0.5)).max() < 0.02
    assert np.abs(cell(image, 0, 1) - colour(1.0)).max() < 0.02


def test_numbers_are_written_only_where_they_fit(tmp_path: Path) -> None:
    def tones(blocks: int) -> int:
        rank_map({f"h.{i}.attn": 3 for i in range(blocks)}, tmp_path / "ranks.png")
        image, high = pixels(tmp_path / "ranks.png"), min(pictures._TALL, max(pictures._FLAT, pictures._PAGE / blocks))
        y, x = (
            150 * (pictures._TOP + np.array([0.15, 0.85]) * high),
            150 * (pictures._LEFT + 0.46 * np.array([0.1, 0.9])),
        )
        inside = image[round(y[0]) : round(y[1]), round(x[0]) : round(x[1])]
        return len(np.unique(inside.reshape(-1, 3), axis=0))

    assert tones(20) > 1
    assert tones(200) == 1


def test_panels_stand_side_by_side_and_a_map_of_zeros_is_drawn(tmp_path: Path) -> None:
    zeros = {f"h.{i}.attn.q": 0.0 for i in range(3)}
    heat_maps({"rank": zeros}, tmp_path / "one.png")
    heat_maps({"rank": zeros, "effective rank": zeros}, tmp_path / "two.png")
    one, two = (pixels(tmp_path / f"{n}.png") for n in ("one", "two"))
    assert two.shape[1] == pytest.approx(2 * one.shape[1], abs=2)
    assert np.abs(cell(one, 0, 0) - colour(0.0)).max() < 0.02


def test_what_can_t_be_drawn_or_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no layers to draw"):
        rank_map({}, tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"picture .*file.*a\.png: can't be written"):
        rank_map({"h.0.q": 1}, tmp_path / "file" / "a.png")
    rank_map({"h.0.q": 1}, tmp_path / "new" / "folder" / "a.png")
    assert pixels(tmp_path / "new" / "folder" / "a.png").std() > 0.05


def test_matplotlib_is_imported_only_to_draw_and_pyplot_never(tmp_path: Path) -> None:
    code = (
        "import sys; from trivet.pictures import rank_map; assert not {'matplotlib', 'torch'} & {*sys.modules}; "
        f"rank_map({{'h.0.q': 1}}, {str(tmp_path / 'a.png')!r}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# -- the path of a squeeze ---------------------------------------------------------------------------------------------

SQUEEZED = [
    {"step": 100 + 40 * k, "parameters_before": before, "parameters": after, "price": price, "ranks": {"h.0.q": 1}}
    for k, (before, after, price) in enumerate(
        [(2_000_000, 2_000_000, 0.0), (2_000_000, 900_000, 1e-9), (900_000, 500_000, 3e-8), (500_000, 500_000, None)]
    )
]
VALIDATED = [(100, 2.0), (200, 1.5), (300, None), (400, float("nan")), (500, 1.4)]
TRIED = {"step": 90, "tried": {2_000_000: 1.5, 1_000_000: 1.51, 500_000: 1.52, 0: 3.0}, "budget": 500_000}
PLANNED = {"step": 0, "budget": 1000, "price": 1e-7}


@pytest.mark.parametrize(
    ("history", "validations", "panels", "colours"),
    [
        (SQUEEZED, VALIDATED, 3, "brg"),
        (SQUEEZED, [], 2, "br"),
        ([TRIED, *SQUEEZED], VALIDATED, 4, "brg"),
        ([{**TRIED, "tried": {str(k): v for k, v in TRIED["tried"].items()}}], [], 2, "rg"),  # type: ignore[attr-defined]
        ([{**h, "price": 0.0} for h in SQUEEZED], VALIDATED, 2, "bg"),
        ([PLANNED], VALIDATED, 3, "rg"),
        ([], [], 1, ""),
    ],
    ids=["squeeze", "no validation", "auto", "auto from JSON", "uniform", "planned", "nothing"],
)
def test_what_there_is_is_drawn(history: Any, validations: Any, panels: int, colours: str, tmp_path: Path) -> None:
    rank_path(history, validations, tmp_path / "path.png")
    image = pixels(tmp_path / "path.png")
    assert image.shape[:2] == (round(150 * (0.6 + 2.0 * panels)), round(150 * 7.5))
    assert image.std() > 0.03
    known = {"b": pictures._BLUE, "r": pictures._RED, "g": pictures._GREEN}
    assert {c for c in known if has(image, known[c])} == set(colours)


def test_the_curve_steps_down_where_parameters_went(tmp_path: Path) -> None:
    """The blue line's height at a step is the number of parameters held after it."""
    history = [{"step": 50, "parameters_before": 1000, "parameters": 250, "price": None}]
    rank_path(history, [(100, 1.0)], tmp_path / "path.png")
    image = pixels(tmp_path / "path.png")[:330]
    from matplotlib.colors import to_rgb

    rows, columns = np.nonzero(np.abs(image - np.array(to_rgb(pictures._BLUE))).max(-1) < 0.02)
    left, right = columns.min(), columns.max()
    early = rows[columns == left + (right - left) // 4].mean()
    late = rows[columns == left + 3 * (right - left) // 4].mean()
    falls = [c for c in range(left, right) if (columns == c).sum() > 50]
    assert left + 0.48 * (right - left) < np.mean(falls) < left + 0.52 * (right - left)
    spines = np.nonzero((image[:, (left + right) // 2 + 20] < 0.2).all(-1))[0]  # the axis at 0
    base = spines.max()
    assert (base - late) / (base - early) == pytest.approx(0.25, abs=0.02)


def test_brief() -> None:
    assert [brief(n) for n in (0, 999, 1000, 12_340, 2_500_000, 7e9)] == ["0", "999", "1k", "12.3k", "2.5M", "7B"]
