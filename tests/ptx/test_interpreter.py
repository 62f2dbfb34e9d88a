"""The PTX interpreter on programs with known results, on a compiled kernel, and on mutants of that kernel.

If NANO24_PTX is set, the interpreter also runs the kernels' self-test with the largest errors that a GPU may make.
"""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton backend: triton is not installed")

import sparse24
from ptx import interpreter

ROOT = Path(__file__).resolve().parents[2]
INF, NAN = 0x7F800000, 0x7FC00000


def launch(body: str, *arguments, threads: int = 32, programs: int = 1, shared: int = 0, errors: str | None = None):
    """Run a kernel with this body. It has the thread's number in %r0 and the arguments in %rd0, %rd1 and so on."""
    parameters = ",\n".join(f".param .u64 program_param_{i}" for i in range(len(arguments)))
    loads = "\n".join(f"ld.param.b64 %rd{i}, [program_param_{i}];" for i in range(len(arguments)))
    text = f"""
        .visible .entry program(
        {parameters}
        )
        .reqntid {threads}
        {{
        .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<19>; .reg .b64 %rd<9>;
        {loads}
        mov.u32 %r0, %tid.x;
        {body}
        ret;
        }}"""
    interpreter.run(text, programs, threads, shared, list(arguments), errors)


def compute(body: str, *inputs: list[int], errors: str | None = None) -> list[int]:
    """Thread i has word i of the first input in %r1, of the second in %r2 and so on. Returns each thread's %r0."""
    words = torch.tensor([column + [0] * (32 - len(column)) for column in inputs], dtype=torch.uint32)
    out = torch.zeros(32, dtype=torch.uint32)
    loads = "\n".join(f"ld.global.b32 {{ %r{i + 1} }}, [ %rd2 + {128 * i} ];" for i in range(len(inputs)))
    launch(
        f"""mad.wide.u32 %rd2, %r0, 4, %rd0;
        mad.wide.u32 %rd3, %r0, 4, %rd1;
        {loads}
        {body}
        st.global.b32 [ %rd3 + 0 ], {{ %r0 }};""",
        words,
        out,
        errors=errors,
    )
    return out.tolist()[: len(inputs[0])]


def floats(*values: float) -> list[int]:
    return [struct.unpack("<I", struct.pack("<f", value))[0] for value in values]


# ---------------------------------------------------------------------------------------------------------------------
# Instructions


BRANCHES = """setp.eq.b32 %p1, %r1, 0; setp.eq.b32 %p2, %r1, 1; mov.b32 %r0, 0;
    @%p1 bra $L__first;
    @%p2 bra $L__second;
    add.s32 %r0, %r0, 1;
    $L__first:
    add.s32 %r0, %r0, 10;
    $L__second:
    add.s32 %r0, %r0, 100;"""
SELECT = "selp.b32 %r0, 7, 8, %p1;"
# name: (body, inputs, expected). If the body is an opcode only, its operands are %r0, %r1, %r2 and so on.
INSTRUCTIONS = {
    # a nibble of the selector selects a byte of (b, a), or if bit 3 is set, the byte's sign
    "prmt": ("prmt.b32", ([0x33221100] * 2, [0xF7665544] * 2, [0x3210, 0x7654]), [0x33221100, 0xF7665544]),
    "prmt mixes": ("prmt.b32", ([0x33221100] * 2, [0xF7665544] * 2, [0x5410, 0x0167]), [0x55441100, 0x001166F7]),
    "prmt copies signs": ("prmt.b32", ([0x33221100], [0xF7665544], [0xF888]), [0xFF000000]),
    "lop3 (a & b) | c": ("lop3.b32 %r0, %r1, %r2, %r3, 0xea;", ([0xFF00], [0x0FF0], [0x000F]), [0x0F0F]),
    "lop3 a ^ b ^ c": ("lop3.b32 %r0, %r1, %r2, %r3, 0x96;", ([0b1100], [0b1010], [0xFFFFFFFF]), [0xFFFFFFF9]),
    "bfe": ("bfe.u32 %r0, %r1, 4, 8;", ([0xABCDEF12],), [0xF1]),
    "bfe signed": ("bfe.s32 %r0, %r1, 26, 1;", ([1 << 26, 1 << 27],), [0xFFFFFFFF, 0]),
    "bfe of all bits": ("bfe.s32 %r0, %r1, 0, 32;", ([0x80000001],), [0x80000001]),
    "shl beyond the width": ("shl.b32", ([3, 3, 3], [1, 31, 32]), [6, 0x80000000, 0]),
    "shr beyond the width": ("shr.s32", ([0x80000000] * 2, [4, 40]), [0xF8000000, 0xFFFFFFFF]),
    "shr unsigned": ("shr.u32", ([0x80000000] * 2, [4, 40]), [0x08000000, 0]),
    "mul.hi": ("mul.hi.u32", ([0xD2511F53], [0xFFFFFFFF]), [0xD2511F52]),
    "mul.wide": ("mul.wide.s32 %rd4, %r1, %r2; mov.b64 {_, %r0}, %rd4;", ([2**32 - 1, 1 << 31], [1, 1 << 31]),
        [2**32 - 1, 1 << 30]),
    "mad.wide": ("mov.b64 %rd4, {%r2, %r2}; mad.wide.u32 %rd4, %r1, 16, %rd4; mov.b64 {_, %r0}, %rd4;",
        ([0xF0000000], [0x10]), [0x1F]),
    "div rounds to zero": ("div.s32", ([0xFFFFFFF9, 7], [2, 0xFFFFFFFE]), [0xFFFFFFFD, 0xFFFFFFFD]),
    "min signed": ("min.s32", ([0xFFFFFFFF], [1]), [0xFFFFFFFF]),
    "min unsigned": ("min.u32", ([0xFFFFFFFF], [1]), [1]),
    "cvt.s8": ("cvt.s8.s32 %rs1, %r1; cvt.s32.s16 %r0, %rs1;", ([0x180, 0x17F],), [0xFFFFFF80, 0x7F]),
    "cvt to 64 bits": (
        "cvt.s64.s32 %rd4, %r1; cvt.u64.u32 %rd5, %r1; add.s64 %rd4, %rd4, %rd5; mov.b64 {_, %r0}, %rd4;",
        ([0x80000000, 0x7FFFFFFF],), [0, 0]),
    "mov of halves": ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r0, {%rs2, %rs1};", ([0x12345678],), [0x56781234]),
    # ties to even, subnormals, overflow, the canonical NaN; the first operand goes into the high half
    "cvt.rn.bf16x2": ("cvt.rn.bf16x2.f32",
        ([0x3F800000, 0x3F808000, 0x00018000, 0xFF800001], [0x40000000, 0x3F818000, 0x7F7FFFFF, INF]),
        [0x3F804000, 0x3F803F82, 0x00027F80, 0x7FFF7F80]),
    "cvt.f32.bf16": ("cvt.u16.u32 %rs1, %r1; cvt.f32.bf16 %r0, %rs1;", ([0x8001, 0x3F80],), [0x80010000, 0x3F800000]),
    "cvt.rn.f16": ("cvt.rn.f16.f32 %rs1, %r1; cvt.u32.u16 %r0, %rs1;", (floats(1, 65520, 2.0**-24, 1 + 2.0**-11),),
        [0x3C00, 0x7C00, 1, 0x3C00]),
    "max.NaN": ("max.NaN.f32", (floats(1, -0.0, 0.0), floats(2, 0.0, -0.0)), floats(2, 0.0, 0.0)),
    "max.NaN of NaN": ("max.NaN.f32", ([NAN, 0xFF800001], [*floats(1), INF]), [0x7FFFFFFF] * 2),
    "min.NaN": ("min.NaN.f32", (floats(1, -0.0, 0.0), floats(2, 0.0, -0.0)), floats(1, -0.0, -0.0)),
    "min.NaN of NaN": ("min.NaN.f32", ([NAN], floats(1)), [0x7FFFFFFF]),
    "max.NaN.bf16x2": ("max.NaN.bf16x2", ([0x3F804000, 0x7FC03F80, 0x80000001], [0x40003F80, 0x3F80FF81, 0x00000002]),
        [0x40004000, 0x7FFF7FFF, 0x00000002]),
    # 1 + 2^-11 + 2^-24 is a tie. The third operand decides it, although it is too small for float64
    "fma rounds once": ("fma.rn.f32 %r0, %r1, %r1, %r2;",
        (floats(*[1 + 2.0**-12] * 3), floats(0, 2.0**-60, -(2.0**-60))), [0x3F801000, 0x3F801001, 0x3F801000]),
    "subnormals stay": ("add.rn.f32", ([1], [1]), [2]),
    "div.rn": ("div.rn.f32", (floats(1, 1, 0), floats(3, 0, 0)), [0x3EAAAAAB, INF, 0x7FFFFFFF]),
    "sqrt.rn": ("sqrt.rn.f32", (floats(2, -1),), [0x3FB504F3, 0x7FFFFFFF]),
    "neg": ("neg.s32", ([1, 0x80000000],), [0xFFFFFFFF, 0x80000000]),
    "abs": ("abs.f32", (floats(-1, -0.0),), floats(1, 0)),
    "ex2": ("ex2.approx.ftz.f32", ([*floats(3, -126), 0xFF800000, INF],), [*floats(8, 2.0**-126, 0), INF]),
    "ex2 flushes subnormals": ("ex2.approx.ftz.f32", (floats(-127, -1e-40),), floats(0, 1)),
    "rcp": ("rcp.approx.ftz.f32", ([*floats(4, -0.0), INF],), [*floats(0.25), 0xFF800000, 0]),
    "rcp flushes subnormals": ("rcp.approx.ftz.f32", (floats(1e-40, 3e38),), [INF, 0]),
    "setp and selp": (f"setp.lt.f32 %p1, %r1, %r2; {SELECT}", ([*floats(1, 2), NAN], floats(2, 1, 1)), [7, 8, 8]),
    "setp unordered": (f"setp.leu.f32 %p1, %r1, %r2; {SELECT}", ([*floats(2), NAN], floats(1, 1)), [8, 7]),
    "setp of numbers": (f"setp.num.f32 %p1, %r1, %r1; {SELECT}", ([*floats(2), NAN],), [7, 8]),
    "setp signed": (f"setp.lt.s32 %p1, %r1, 0; {SELECT}", ([0xFFFFFFFF, 0],), [7, 8]),
    "setp unsigned": (f"setp.lt.u32 %p1, %r1, 1; {SELECT}", ([0xFFFFFFFF, 0],), [8, 7]),
    "setp of both halves": (
        "setp.gt.bf16x2 %p1|%p2, %r1, %r2; selp.b32 %r0, 1, 0, %p1; selp.b32 %r4, 2, 0, %p2; or.b32 %r0, %r0, %r4;",
        ([0x3F804000, 0x40003F80], [0x3F803F80, 0x3F803F80]), [1, 2]),
    "predicates": (
        "setp.ne.b32 %p1, %r1, 0; not.pred %p2, %p1; mov.b32 %r0, 5; @%p1 mov.b32 %r0, 6; @!%p2 add.s32 %r0, %r0, 1;",
        ([0, 1],), [5, 7]),
    "inline assembly": ("{ .reg .b32 both; and.b32 both, %r1, 0x7fff7fff; \n or.b32 %r0, both, -2147483648; }",
        ([0xFFFFFFFF],), [0xFFFF7FFF]),
    "branches": (BRANCHES, ([0, 1, 2],), [110, 100, 111]),
    "branches that no thread takes": (BRANCHES, ([7, 7],), [111, 111]),
    "a branch that all threads take": (BRANCHES, ([1, 1],), [100, 100]),
    "shfl": ("shfl.sync.bfly.b32 %r0, %r1, 1, 31, -1;", ([10, 11, 12, 13],), [11, 10, 13, 12]),
}  # fmt: skip


@pytest.mark.parametrize("name", list(INSTRUCTIONS))
def test_instruction(name):
    body, inputs, expected = INSTRUCTIONS[name]
    if " " not in body:
        body = f"{body} {', '.join(f'%r{i}' for i in range(len(inputs) + 1))};"
    assert compute(body, *inputs) == expected


@pytest.mark.parametrize(("errors", "ulps"), [("low", {-1}), ("high", {1}), ("random", {-1, 0, 1})])
def test_approximate_instructions_have_the_largest_error_allowed(errors, ulps):
    exact = floats(*(1 / (2 + i) for i in range(32)))
    got = compute("rcp.approx.ftz.f32 %r0, %r1;", floats(*(2 + i for i in range(32))), errors=errors)
    assert {a - b for a, b in zip(got, exact, strict=True)} == ulps
    (power,) = floats(8)
    got = compute("ex2.approx.ftz.f32 %r0, %r1;", floats(3) * 32, errors=errors)
    assert {min(got) - power, max(got) - power} == {2 * min(ulps), 2 * max(ulps)}
    assert compute("ex2.approx.ftz.f32 %r0, %r1;", [0xFF800000], errors=errors) == [0]


def test_undefined_registers_are_random_at_every_read():
    first_read, second_read = (compute("mov.b32 %r0, %r9;" * reads, [0] * 32) for reads in (1, 2))
    assert len(set(first_read)) == 32
    assert not set(first_read) & set(second_read)
    half_written = compute("setp.lt.u32 %p1, %r0, 16; @%p1 mov.b32 %r9, 1; mov.b32 %r0, %r9;", [0] * 32)
    assert half_written[:16] == [1] * 16
    assert len(set(half_written[16:])) == 16


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def test_vectors_and_bytes():
    x, out = torch.arange(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    body = """mad.wide.u32 %rd2, %r0, 16, %rd0; mad.wide.u32 %rd3, %r0, 16, %rd1;
        ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd2 + 0 ];
        st.global.v2.b32 [ %rd3 + 8 ], { %r1, %r4 };
        add.s64 %rd3, %rd3, 8;
        ld.global.b8 { %rs1 }, [ %rd2 + 4 ];
        st.global.b8 [ %rd3 + -7 ], { %rs1 };"""
    launch(body, x, out)
    x, out = x.view(32, 4), out.view(32, 4)
    assert torch.equal(out[:, 2:], x[:, [0, 3]])
    assert torch.equal(out[:, 0], x[:, 1] << 8)
    assert not out[:, 1].any()


def test_programs_have_separate_shared_memories():
    out = torch.zeros(2, 64, dtype=torch.int32)
    body = """mov.u32 %r1, %ctaid.x; mad.lo.s32 %r2, %r1, 64, %r0; mad.wide.u32 %rd2, %r2, 4, %rd0;
        shl.b32 %r3, %r0, 2; mov.b32 %r4, global_smem; add.s32 %r3, %r3, %r4;
        st.shared.b32 [%r3], %r2;
        bar.sync 0;
        xor.b32 %r3, %r3, 128;
        ld.shared.b32 %r5, [%r3];
        st.global.b32 [ %rd2 + 0 ], { %r5 };"""
    launch(body, out, threads=64, programs=2, shared=256)
    assert torch.equal(out, torch.arange(128, dtype=torch.int32).view(2, 64).roll(32, 1))


def test_matrix_instructions_transpose():
    """stmatrix stores four 8x8 matrices as rows of 16 bytes; ldmatrix.trans loads each of them transposed."""
    x, out = torch.arange(256, dtype=torch.int16).view(4, 8, 8), torch.zeros(4, 8, 8, dtype=torch.int16)
    body = """mad.wide.u32 %rd2, %r0, 4, %rd0; mad.wide.u32 %rd3, %r0, 4, %rd1; shl.b32 %r9, %r0, 4;
        ld.global.b32 { %r1 }, [ %rd2 + 0 ]; ld.global.b32 { %r2 }, [ %rd2 + 128 ];
        ld.global.b32 { %r3 }, [ %rd2 + 256 ]; ld.global.b32 { %r4 }, [ %rd2 + 384 ];
        stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r9], {%r1, %r2, %r3, %r4};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r5, %r6, %r7, %r8}, [%r9];
        st.global.b32 [ %rd3 + 0 ], { %r5 }; st.global.b32 [ %rd3 + 128 ], { %r6 };
        st.global.b32 [ %rd3 + 256 ], { %r7 }; st.global.b32 [ %rd3 + 384 ], { %r8 };"""
    launch(body, x, out, shared=512)
    assert torch.equal(out, x.transpose(1, 2))


def test_addresses_in_a_table_reach_their_tensors():
    x, out = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    table = torch.tensor([x.data_ptr(), out.data_ptr()])
    body = """ld.global.b64 { %rd1 }, [ %rd0 + 0 ]; ld.global.b64 { %rd2 }, [ %rd0 + 8 ];
        mad.wide.u32 %rd3, %r0, 4, %rd1; mad.wide.u32 %rd4, %r0, 4, %rd2;
        ld.global.b32 { %r1 }, [ %rd3 + 0 ]; st.global.b32 [ %rd4 + 0 ], { %r1 };"""
    launch(body, table)
    assert torch.equal(out, x)
    with pytest.raises(interpreter.Fault, match="out of bounds"):
        launch(body.replace("%rd3 + 0", "%rd3 + 4"), table)


AT_WORD, STORE = "mad.wide.u32 %rd1, %r0, 4, %rd0;", "st.global.b32 [ %rd1 + 0 ], { %r0 };"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (AT_WORD + "st.global.b32 [ %rd1 + 4 ], { %r0 };", "out of bounds: 1 threads, first thread 31, at byte 128 of"),
        (AT_WORD + "st.global.b32 [ %rd1 + -4 ], { %r0 };", "out of bounds: 1 threads, first thread 0"),
        (AT_WORD + "ld.global.b32 { %r1 }, [ %rd1 + 4096 ];", "out of bounds: 32 threads"),
        (AT_WORD + "ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", "misaligned: thread 1 .* multiple of 16"),
        (AT_WORD + "st.global.b32 [ %rd1 + 2 ], { %r0 };", "misaligned: thread 0 .* multiple of 4"),
        ("st.global.b32 [ %rd0 + 0 ], { %r0 };", "two threads write different values to one address"),
        (
            AT_WORD + STORE + "setp.eq.b32 %p1, %r0, 5; @%p1 st.global.b32 [ %rd0 + 8 ], { %r0 };",
            "two threads write different values to one address, one of them 5",
        ),
        ("st.shared.b32 [global_smem], %r0;", "two threads write different values to one address"),
        ("shl.b32 %r1, %r0, 2; st.shared.b32 [%r1+4], %r0;", "out of bounds: 1 threads, first thread 31"),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r0];", "misaligned: thread 1 .* multiple of 16"),
        ("setp.eq.b32 %p1, %r0, 0; @%p1 bar.sync 0;", "only some of 32 threads"),
        ("setp.eq.b32 %p1, %r0, 0; @%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;", "only some of 32 threads"),
        ("$L__loop: \n bra $L__loop;", "loops are not modelled"),
        ("max.f32 %r1, %r0, %r0;", r"`max.f32 %r1, %r0, %r0`: max.f32"),
        ("add.s64 %rd1, %rd0, %r0;", "%r0 has fewer bits than .s64"),
        ("mov.b32 %q1, 0;", "%q is not declared"),
        ("add.s32 %r1, %r0;", "1 operands, need 2"),
        ("ld.global.L1::evict_first.b32 { %r1 }, [ %rd0 + 0 ];", "with no other modifiers"),
        ("shfl.sync.up.b32 %r1, %r0, 1, 0, -1;", "only shfl.sync.bfly.b32"),
        ("cvt.rzi.s32.f32 %r1, %r0;", "cvt.rzi.s32.f32"),
    ],
)
def test_fault(body, message):
    tensor = torch.full((32,), 7, dtype=torch.int32)
    with pytest.raises(interpreter.Fault, match=message):
        launch(body, tensor, shared=128)
    assert (tensor == 7).all(), "a launch that faults changes nothing"


def test_masked_accesses_and_equal_values_are_no_fault():
    out = torch.zeros(8, dtype=torch.int32)
    launch(AT_WORD + "setp.lt.u32 %p1, %r0, 8; @%p1 " + STORE, out)
    assert out.tolist() == list(range(8))
    launch("st.global.b32 [ %rd0 + 4 ], { 9 };", out)
    assert out.tolist() == [0, 9, *range(2, 8)]


def test_bounds_are_the_bounds_of_the_view():
    both = torch.zeros(64, dtype=torch.int32)
    launch(AT_WORD + STORE, both[:32])
    assert both.tolist() == [*range(32), *[0] * 32]
    with pytest.raises(interpreter.Fault, match="at byte 128 of 128"):
        launch(AT_WORD + "st.global.b32 [ %rd1 + 4 ], { 1 };", both[:32])


def test_run_refuses_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="run: 1 arguments, errors 'worst'"):
        launch("", torch.zeros(4), errors="worst")


# ---------------------------------------------------------------------------------------------------------------------
# A compiled kernel


@pytest.fixture(scope="module")
def compiled() -> tuple:
    """transposable_index for sm_90 as (PTX, programs, threads, shared memory). A process without TRITON_INTERPRET
    compiles it."""
    code = """import json, torch, kernels
from benchmarks import kernel_times
((kernel, grid),) = kernel_times.compile_only(lambda: kernels.transposable_index(torch.zeros(32, 64)), 90)
print(json.dumps([kernel.asm["ptx"], *grid, 32 * kernel.metadata.num_warps, kernel.metadata.shared]))"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(32, 64, generator=generator)
    ties = torch.randint(-2, 3, w.shape, generator=generator)
    w = torch.where(torch.rand(w.shape, generator=generator) < 0.4, ties, w)
    w[0, :3] = torch.tensor([float("inf"), float("nan"), 1e-45])
    return w


def search(text: str, programs: int, threads: int, shared: int) -> torch.Tensor:
    """The index that the compiled kernel finds for `weight()`."""
    w, index = weight(), torch.zeros(8, 16, dtype=torch.uint8)
    columns, blocks, stride_row = index.shape[1], index.numel(), w.stride(0)  # stride_column = 1 is compiled in
    interpreter.run(text, programs, threads, shared, [w, index, columns, blocks, stride_row, 0, 0])
    return index


def test_a_compiled_kernel_equals_its_twin(compiled):
    assert "sm_90a" in compiled[0]
    assert torch.equal(search(*compiled), sparse24.transposable_index.torch(weight()))


def mutants(text: str) -> list[tuple[str, str]]:
    """(changed line, program): each swaps the operands of one selp or the direction of one setp."""
    programs = []
    for line in re.finditer(r"\bselp\.b32 \t(%r\d+), (\S+), (\S+), (%p\d+);|\bsetp\.(gt|lt)\.(f32) .*;", text):
        if line[1]:
            broken = f"selp.b32 {line[1]}, {line[3]}, {line[2]}, {line[4]};"
        else:
            broken = line[0].replace(*((".gt", ".lt") if line[5] == "gt" else (".lt", ".gt")))
        programs.append((line[0], text[: line.start()] + broken + text[line.end() :]))
    return programs


def test_every_mutant_of_the_compiled_kernel_is_noticed(compiled):
    text, *launch_options = compiled
    expected, broken = sparse24.transposable_index.torch(weight()), mutants(text)
    assert len(broken) > 30
    survivors = [line for line, mutant in broken if torch.equal(search(mutant, *launch_options), expected)]
    assert not survivors


def test_a_missing_mask_in_the_compiled_kernel_is_a_fault(compiled):
    text, programs, threads, shared = compiled
    unmasked, stores = re.subn(r"@%p\d+ st\.global\.b8", "st.global.b8", text)
    assert stores == 1
    w, index = torch.zeros(8, 64), torch.zeros(2, 16, dtype=torch.uint8)
    arguments = [w, index, 16, index.numel(), 64, 0, 0]
    interpreter.run(text, programs, threads, shared, arguments)
    message = r"_transposable_index_kernel, kernels\.py:\d+: `st\.global\.b8.*: out of bounds: 96 threads"
    with pytest.raises(interpreter.Fault, match=message):
        interpreter.run(unmasked, programs, threads, shared, arguments)


@pytest.mark.skipif("NANO24_PTX" not in os.environ, reason="PTX backend: only `make test-ptx` compiles the kernels")
@pytest.mark.parametrize(("arch", "errors"), [(80, None), (90, None), (90, "low"), (90, "high"), (90, "random")])
def test_kernels_pass_their_self_test(arch, errors):
    with interpreter.interpreted(arch, errors):
        assert sparse24.kernel_mismatches(torch.device("cpu")) == []
