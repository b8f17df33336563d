"""The decoder's CUDA sources without a card: NVRTC compiles them, their argument structures agree, and products fit any card."""

from __future__ import annotations

import ctypes
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.generate.decoder.choice import MISSING
from nybble.kernels.cuda import arguments, layout
from nybble.kernels.cuda import compile as compiling

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}  # KiB of a block, at most
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)


def defines(rows, blocks, architecture):
    own = layout.product_layout(rows, blocks, SHARED[architecture] * 1024)
    return {**own.defines, "WEIGHTS": 3, "NESTED": 1, "EXACT": int(blocks % own.warp_blocks == 0), "ADAPTERS": 0}


def compile_all(architecture, rows, heads):
    for adapters in (0, 1, 2):
        assert compiling.cubin("elementwise", architecture, {"ADAPTERS": adapters}, None)
    for head, group in heads:
        together, apart = layout.attention_groups(head, group)
        for appended in (0, 1):
            sizes = {
                "HEAD": head,
                "GROUP": together,
                "SUBGROUPS": apart,
                "APPENDED": appended,
                "ADAPTERS": 1,
                "FP8": appended,
            }
            assert compiling.cubin("attention", architecture, sizes, None)
    for count in rows:
        assert compiling.cubin("product", architecture, defines(count, 64, architecture), None)


def test_the_kernels_compile_without_a_toolkit_or_a_card():
    compile_all("sm_90", (1, 16), [(128, 1)])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED)
def test_the_kernels_compile_for_every_card(architecture):
    compile_all(architecture, ROWS, [(64, 3), (64, 8), (80, 1), (96, 4), (128, 1), (128, 4), (128, 8), (256, 2)])


def test_machine_code_is_kept_by_source_constants_and_card(tmp_path, monkeypatch):
    first = compiling.cubin("elementwise", "sm_90", {"ADAPTERS": 0}, tmp_path / "kernels")
    files = list((tmp_path / "kernels").iterdir())
    assert [file.suffix for file in files] == [".cubin"]
    monkeypatch.setattr(compiling, "_compile", lambda *_: b"compiled")
    assert compiling.cubin("elementwise", "sm_90", {"ADAPTERS": 0}, tmp_path / "kernels") == first
    assert compiling.cubin("elementwise", "sm_90", {"ADAPTERS": 1}, tmp_path / "kernels") == b"compiled"
    assert compiling.cubin("elementwise", "sm_80", {"ADAPTERS": 0}, tmp_path / "kernels") == b"compiled"
    assert len(list((tmp_path / "kernels").iterdir())) == 3


def test_what_does_not_compile_says_so_in_nvrtcs_words(monkeypatch, capsys):
    monkeypatch.setattr(
        compiling, "read_source", lambda name: 'extern "C" __global__ void broken() { undeclared = 1; }'
    )
    with pytest.raises(compiling.CompileError) as failed:
        compiling.cubin("product", "sm_90", {}, None)
    print(failed.value)
    shown = capsys.readouterr().out
    assert "product.cu does not compile for sm_90" in shown
    assert 'identifier "undeclared" is undefined' in shown


@pytest.mark.parametrize(
    "structure, file, own",
    [
        ("Adapter", "common", arguments.Adapter), ("Parts", "common", arguments.Parts), ("Weight", "product", arguments.Weight),
        ("Product", "product", arguments.ProductArguments), ("AddNorm", "elementwise", arguments.AddNormArguments),
        ("SwiGlu", "elementwise", arguments.SwiGluArguments), ("Attention", "attention", arguments.AttentionArguments),
    ],
)  # fmt: skip
def test_a_structure_is_the_same_in_both_languages(structure, file, own):
    """By the names of its fields, and by its size, which the compiler checks."""
    source = compiling.read_source("product" if file == "common" else file)
    body = re.search(rf"struct {structure} \{{(.*?)\n\}};", source, re.DOTALL)
    assert body is not None
    plain = re.sub(r"//.*|\[[^\]]*\]", "", body[1])
    names = [name for line in plain.split(";") for name in re.findall(r"[*\s](\w+)\s*(?:,|$)", line.strip())]
    assert names == [field[0] for field in own._fields_]
    check = f'{source}\nstatic_assert(sizeof({structure}) == {ctypes.sizeof(own)}, "another size");'
    options = ("-arch=sm_90", *compiling.OPTIONS)
    product = "\n".join(f"#define {key} {value}" for key, value in defines(1, 64, "sm_90").items() if key != "ADAPTERS")
    constants = {"HEAD": 128, "GROUP": 1, "SUBGROUPS": 1, "APPENDED": 0, "ADAPTERS": 2, "FP8": 0}
    check = f"{product}\n{check}" if file in ("common", "product") else check
    assert compiling._compile(file, check, options + tuple(f"-D{key}={value}" for key, value in constants.items()))


@given(st.integers(1, layout.MAX_ROWS), st.integers(1, 600), st.sampled_from(sorted(set(SHARED.values()))))
def test_a_product_fits_any_card_and_covers_all_of_k(rows, blocks, kilobytes):
    own = layout.product_layout(rows, blocks, kilobytes * 1024)
    assert own.tiles * 8 >= rows
    assert own.shared_bytes <= kilobytes * 1024
    assert own.chunk_blocks * own.chunks >= blocks > own.chunk_blocks * (own.chunks - 1)


@given(st.integers(1, 16), st.sampled_from([64, 80, 96, 128, 256]))
def test_all_query_heads_of_a_group_are_computed(group, head):
    together, apart = layout.attention_groups(head, group)
    assert together * apart == group
    assert together <= 4
