"""The reader of optimised HLO: by hand-counted texts, and against XLA's own analysis."""

import jax
import jax.numpy as jnp
import pytest

from cnn_jax.runtime import hlo
from cnn_jax.runtime.hlo import Flops, Frame, Traffic

ADD = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}
"""
SCALED = """
%scaled (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %two = f32[] constant(2)
  %twos = f32[8]{0} broadcast(%two), dimensions={}
  ROOT %product = f32[8]{0} multiply(%p, %twos), metadata={op_name="jit(f)/scale/mul"}
}
"""


def module(entry, *computations, header=""):
    """Reads a module whose entry computation has these instructions."""
    lines = [f"HloModule m, is_scheduled=true{header}", *computations]
    return hlo.read("\n".join([*lines, "ENTRY %main () -> f32[] {", entry, "}"]))


def only(items):
    (item,) = items
    return item


# Reading

WITH_SHAPES = r"""HloModule jit_f, is_scheduled=true, input_output_alias={ {1}: (0, {}, may-alias) }, entry_computation_layout={(f32[8]{0})->(f32[], /*index=1*/f32[8]{0})}, num_partitions=4

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(f32[] %a, f32[] %b)
}

ENTRY %main.1 (x: f32[8]) -> (f32[], f32[8]) {
  %x = f32[8]{0} parameter(0), metadata={op_name="params[\'stem\'][\"kernel\"]"}
  %zero = f32[] constant(0)
  %total = f32[] reduce(f32[8]{0} %x, f32[] %zero), dimensions={0}, to_apply=%sum
  ROOT %out = (f32[], /*index=1*/f32[8]{0}) tuple(f32[] %total, /*index=1*/f32[8]{0} %x)
}
"""  # noqa: E501
WITHOUT_SHAPES = r"""HloModule jit_f, is_scheduled=true, input_output_alias={ {1}: (0, {}, may-alias) }, num_partitions=4

sum {
  a = f32[] parameter(0)
  b = f32[] parameter(1)
  ROOT add = f32[] add(a, b)
}


ENTRY main.1 {
  x = f32[8]{0} parameter(0), metadata={op_name="params[\'stem\'][\"kernel\"]"}
  zero = f32[] constant(0)
  total = f32[] reduce(x, zero), dimensions={0}, to_apply=sum
  ROOT out = (f32[], f32[8]{0}) tuple(total, x)
}
"""  # noqa: E501


@pytest.mark.parametrize("text", [WITH_SHAPES, WITHOUT_SHAPES])
def test_both_styles_of_text_are_read(text):
    program = hlo.read(text)
    assert (program.name, program.scheduled, program.devices) == ("jit_f", True, 4)
    assert program.aliases == (((1,), 0, ()),)
    x, zero, total, out = program.entry.instructions
    assert program.entry.name == "main.1"
    assert program.entry.root is out
    assert x.op_name == """params['stem']["kernel"]"""
    assert (x.shape, x.literal) == (hlo.Array("f32", (8,), (0,)), "0")
    assert (zero.literal, zero.operands) == ("0", ())
    assert total.operands == ("x", "zero")
    assert total.called == ("sum",)
    assert total.attributes["dimensions"] == "{0}"
    assert out.shape == (hlo.Array("f32", ()), hlo.Array("f32", (8,), (0,)))
    assert program.entry.users["x"] == (total, out)


@pytest.mark.parametrize(
    ("shape", "size", "place"),
    [
        ("f32[2,3]{0,1}", 24, "device"),
        ("bf16[]", 2, "device"),
        ("pred[5]{0}", 5, "device"),
        ("s4[5]{0:E(4)}", 3, "device"),
        ("f8e4m3fn[4]{0}", 4, "device"),
        ("c64[3]{0}", 24, "device"),
        ("f32[<=8,2]{1,0}", 64, "device"),
        ("token[]", 0, "device"),
        ("f32[64]{0:T(128)}", 512, "device"),
        ("f32[]{:T(128)}", 512, "device"),
        ("f32[9,100]{1,0:T(8,128)}", 16 * 128 * 4, "device"),
        ("f32[9,100]{0,1:T(8,128)}", 104 * 128 * 4, "device"),
        ("bf16[3,64,9]{1,2,0:T(8,128)(2,1)S(1)}", 3 * 16 * 128 * 2, "on_chip"),
        ("bf16[1,64]{1,0:T(1,128)(2,1)}", 2 * 128 * 2, "device"),
        ("f32[4]{0:S(1)}", 16, "device"),
        ("f32[128]{0:T(128)S(5)}", 512, "host"),
        ("(f32[2]{0}, (s32[], f32[3]{0:T(4)}))", 28, "device"),
    ],
)
def test_types_with_layouts_tiles_and_memory_spaces(shape, size, place):
    program = module(f"ROOT %x = {shape} parameter(0)")
    arrays = program.entry.root.arrays
    assert sum(array.bytes for array in arrays) == size
    assert {array.place for array in arrays} == {place}


def test_strings_comments_and_nested_braces_do_not_confuse():
    program = module(
        r"""%x = f32[2]{0} parameter(0)
        %y = f32[2,2]{1,0} constant({ { 1, 2 },
          { 3, 4 } })
        ROOT %call = (f32[2]{0}, u8[16]{0}) custom-call(%x, /*a ( comment*/ %y),
          custom_call_target="odd\"({,%/*", frontend_attributes={a={b={c}},d="},{"},
          backend_config={"x":[{"y":"}"}],"n":"1"}"""
    )
    _, y, call = program.entry.instructions
    assert (call.operands, call.line) == (("x", "y"), 6)
    assert y.literal == "{ { 1, 2 }, { 3, 4 } }"
    assert call.target == r"odd\"({,%/*"
    assert call.attributes["frontend_attributes"] == 'a={b={c}},d="},{"'.join("{}")
    assert call.backend_config == '{"x":[{"y":"}"}],"n":"1"}'


def test_source_lines_written_in_place():
    program = module(
        'ROOT %x = f32[] parameter(0), metadata={op_name="a" source_file="/m/net.py" source_line=7}'
    )
    assert program.entry.root.frames == (Frame("/m/net.py", 7),)
    assert program.entry.root.source == "/m/net.py:7"


def test_source_lines_written_in_tables():
    tables = """
FileNames
1 "/m/train.py"
2 "/m/net.py"

FunctionNames
1 "step"
2 "Net.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=40 end_line=40 column=4 end_column=9}
2 {file_name_id=2 function_name_id=2 line=7 end_line=9 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

"""
    program = module(
        """%y = f32[] constant(1)
        ROOT %x = f32[] negate(%y), metadata={op_name="a" stack_frame_id=2}""",
        tables,
    )
    frames = program.entry.root.frames
    assert frames == (Frame("/m/net.py", 7, "Net.__call__"), Frame("/m/train.py", 40, "step"))
    assert program.entry.instructions[0].source == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 0 .* ends without a HloModule line"),
        ("hello", "line 1 .*neither a computation nor a table.*'hello'"),
        ("HloModule m", "line 1 .* ends without the end of an ENTRY computation"),
        ("HloModule m\n\nENTRY e {\n x = f32[] parameter(0)", "line 4 .* ends without the end"),
        ("HloModule m\nENTRY e {\n}", "line 3 .*computation 'e' is empty"),
        ("HloModule m\nENTRY e {\n x y z\n}", "line 3 .*not an instruction: 'x y z'"),
        ("HloModule m\nENTRY e {\n x = f32[] \n}", "line 3 .*no type and opcode"),
        ("HloModule m\nENTRY e {\n x = f99[] parameter(0)\n}", r"line 3 .*'f99\[\]' is not the ty"),
        ("HloModule m\nENTRY e {\n x = f32[] add(y, y)\n}", "line 3 .*'x' reads 'y', which"),
        ("HloModule m\nENTRY e {\n x = f32[] call(), to_apply=g\n}", "line 3 .*'x' calls 'g'"),
        ("HloModule m\nENTRY e {\n x = (f32[] add(\n", "line 3 .*a bracket is not closed"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(text, message):
    with pytest.raises(ValueError, match=message):
        hlo.read(text)


# Launches


def test_what_launches_nothing_and_what_does():
    program = module(
        """%x = f32[8]{0} parameter(0)
        %c = f32[8]{0} constant({1, 2, 3, 4, 5, 6, 7, 8})
        %b = f32[2,4]{1,0} bitcast(%x)
        %room = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"
        %scale = f32[8]{0} fusion(%x), kind=kLoop, calls=%scaled
        %start = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%scale)
        %done = f32[8]{0} copy-done(%start)
        %pair = (f32[8]{0}, f32[8]{0}) tuple(%done, %c)
        %first = f32[8]{0} get-tuple-element(%pair), index=0
        ROOT %call = f32[8]{0} call(%first), to_apply=%scaled""",
        SCALED,
    )
    kernels = hlo.kernels(program)
    assert [each.name for each in kernels] == ["scale", "start", "twos", "product"]
    assert [each.kind for each in kernels] == ["fusion kLoop", "copy", "broadcast", "multiply"]
    assert kernels[0].op_name == "jit(f)/scale/mul"
    assert hlo.launches(program) == 4


LOOP = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{{0}} get-tuple-element(%p), index=1
  %one = s32[] constant({step})
  %next = s32[] add(%i, %one)
  %y = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%scaled
  ROOT %out = (s32[], f32[8]{{0}}) tuple(%next, %y)
}}
%compared (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt = pred[] compare(%a, %b), direction={direction}
}}
%condition (p: (s32[], f32[8])) -> pred[] {{
  %p.1 = (s32[], f32[8]{{0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[] constant({limit})
  ROOT %goes_on = pred[] fusion(%i.1, %limit), kind=kLoop, calls=%compared
}}
"""
WHILE = """
  %x.2 = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = s32[] copy(%zero)
  %init = (s32[], f32[8]{0}) tuple(%start, %x.2)
  ROOT %loop = (s32[], f32[8]{0}) while(%init), condition=%condition, body=%body"""


@pytest.mark.parametrize(
    ("step", "direction", "limit", "trips"),
    [(1, "LT", 6, 6), (2, "LT", 5, 3), (1, "LE", 6, 7), (-1, "GT", -4, 4), (3, "NE", 9, 3)],
)
def test_a_loop_without_a_known_count_is_followed(step, direction, limit, trips):
    loop = LOOP.format(step=step, direction=direction, limit=limit)
    program = module(WHILE, SCALED, loop)
    copy, _, scale = hlo.kernels(program)
    assert (copy.times, scale.times) == (1, trips)
    assert hlo.launches(program) == 1 + 2 * trips
    assert hlo.traffic(program).total == 8 + trips * (64 + 12)
    assert hlo.flops(program).total == trips * (8 + 1)
    assert hlo.unknown_loops(program) == ()


def test_the_compilers_count_of_a_loop_comes_first():
    known = ', backend_config={"known_trip_count":{"n":"50"},"known_init_step":{"init":"0"}}'
    loop = LOOP.format(step=1, direction="LT", limit=6)
    assert hlo.launches(module(WHILE + known, SCALED, loop)) == 101


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    program = module(WHILE, SCALED, LOOP.format(step=0, direction="LT", limit=6))
    assert hlo.launches(program) == 3
    assert hlo.unknown_loops(program) == ("loop",)


@pytest.mark.parametrize(
    "branches",
    ["branch_computations={%scaled, %twice}", "true_computation=%twice, false_computation=%scaled"],
)
def test_the_costlier_branch_counts(branches):
    twice = """%twice (q: f32[8]) -> f32[8] {
      %q = f32[8]{0} parameter(0)
      %r = f32[8]{0} fusion(%q), kind=kLoop, calls=%scaled
      %s = f32[8]{0} fusion(%r), kind=kLoop, calls=%scaled
      ROOT %t = f32[8]{0} add(%s, %q)
    }"""
    program = module(
        f"""%x = f32[8]{{0}} parameter(0)
        %p = pred[] parameter(1)
        ROOT %y = f32[8]{{0}} conditional(%p, %x, %x), {branches}""",
        SCALED,
        twice,
    )
    assert [each.name for each in hlo.kernels(program)] == ["r", "s", "t"]


# Bytes

SLICING = """
%sliced (p: f32[100,8], q: f32[8], i: s32[]) -> (f32[8], f32[8]) {
  %p = f32[100,8]{1,0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,8]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,8}
  %flat = f32[8]{0} bitcast(%row)
  %part = f32[4]{0} slice(%q), slice={[0:4]}
  %twice = f32[8]{0} concatenate(%part, %part), dimensions={0}
  %weights = f32[8]{0} constant({...})
  %sum = f32[8]{0} add(%flat, %twice)
  %more = f32[8]{0} multiply(%sum, %weights)
  ROOT %out = (f32[8]{0}, f32[8]{0}) tuple(%sum, %more)
}
"""
UPDATING = """
%updated (p: f32[100,8], row: f32[8], i: s32[]) -> f32[100,8] {
  %p.1 = f32[100,8]{1,0} parameter(0)
  %row = f32[8]{0} parameter(1)
  %i.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %as_row = f32[1,8]{1,0} bitcast(%row)
  ROOT %new = f32[100,8]{1,0} dynamic-update-slice(%p.1, %as_row, %i.1, %zero.1)
}
"""


@pytest.mark.parametrize(
    ("instruction", "read", "written"),
    [
        ("f32[100,8]{1,0} add(%big, %big)", 6400, 3200),
        ("f32[10,8]{1,0} slice(%big), slice={[0:10], [0:8]}", 320, 320),
        ("f32[1,8]{1,0} dynamic-slice(%big, %i, %i), dynamic_slice_sizes={1,8}", 32 + 8, 32),
        ("f32[100,8]{1,0} dynamic-update-slice(%big, %row, %i, %i)", 32 + 8, 32),
        ("f32[5,8]{1,0} gather(%big, %rows), slice_sizes={1,8}", 160 + 20, 160),
        (
            "f32[100,8]{1,0} scatter(%big, %rows, %updates), to_apply=%sum",
            160 + 20 + 160,
            160,
        ),
        (
            "(f32[8]{0}, f32[8]{0}) fusion(%big, %vector, %i), kind=kLoop, calls=%sliced",
            32 + 16 + 4 + 32,
            64,
        ),
        ("f32[100,8]{1,0} fusion(%big, %vector, %i), kind=kLoop, calls=%updated", 32 + 4, 32),
        (
            '(f32[8]{0}, u8[999]{0}) custom-call(%vector), custom_call_target="__cublas$other"',
            32,
            32,
        ),
        ('f32[8]{0} custom-call(%vector), custom_call_target="anything"', 32, 32),
        ("(f32[8]{0}, f32[8]{0}) all-reduce(%vector, %vector), to_apply=%sum", 64, 64),
    ],
)
def test_bytes_of_one_kernel(instruction, read, written):
    program = module(
        f"""%big = f32[100,8]{{1,0}} parameter(0)
        %row = f32[1,8]{{1,0}} parameter(1)
        %vector = f32[8]{{0}} parameter(2)
        %rows = s32[5]{{0}} parameter(3)
        %updates = f32[5,8]{{1,0}} parameter(4)
        %i = s32[] parameter(5)
        ROOT %it = {instruction}""",
        ADD,
        SLICING,
        UPDATING,
    )
    assert hlo.traffic(program) == Traffic(read, written)


def test_a_fusion_reads_a_parameter_at_most_once():
    slices = "\n".join(f"%s{i} = f32[6]{{0}} slice(%p), slice={{[{i}:{i + 6}]}}" for i in range(3))
    maxima = f"""%maxima (p: f32[8]) -> f32[6] {{
      %p = f32[8]{{0}} parameter(0)
      {slices}
      %m = f32[6]{{0}} maximum(%s0, %s1)
      ROOT %n = f32[6]{{0}} maximum(%m, %s2)
    }}"""
    program = module(
        """%x = f32[8]{0} parameter(0)
        ROOT %y = f32[6]{0} fusion(%x), kind=kLoop, calls=%maxima""",
        maxima,
    )
    assert hlo.traffic(program) == Traffic(32, 24)


def test_memory_on_the_chip_and_of_the_host_is_counted_apart():
    program = module(
        """%x = f32[8,128]{1,0:T(8,128)} parameter(0)
        %h = f32[8,128]{1,0:T(8,128)S(5)} parameter(1)
        %s = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
        %d = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%s)
        %e = f32[8,128]{1,0:T(8,128)S(1)} add(%d, %h)
        ROOT %out = f32[8,128]{1,0:T(8,128)} copy(%e)"""
    )
    size = 8 * 128 * 4
    assert hlo.traffic(program) == Traffic(size, size, on_chip=4 * size, host=size)
    assert hlo.traffic(program).total == 2 * size


# Operations

IMAGE, KERNEL, OUT = "f32[2,5,5,4]{3,2,1,0}", "f32[3,3,4,8]{3,2,1,0}", "f32[2,5,5,8]{3,2,1,0}"
# Along one side of 5 a padded kernel of 3 meets 4 + 5 + 4 elements.
SAME = 2 * 2 * 4 * 8 * 13 * 13
CUDNN = "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, custom_call_target="


@pytest.mark.parametrize(
    ("operands", "instruction", "count"),
    [
        (
            (IMAGE, KERNEL),
            f"{OUT} convolution(%a, %b), window={{size=3x3 pad=1_1x1_1}}, "
            "dim_labels=b01f_01io->b01f",
            SAME,
        ),
        (  # taps at -1, 0, 1, then 1, 2, 3, then 3, 4, 5
            (IMAGE, KERNEL),
            "f32[2,3,3,8]{3,2,1,0} convolution(%a, %b), window={size=3x3 stride=2x2 pad=1_1x1_1}, "
            "dim_labels=b01f_01io->b01f",
            2 * 2 * 4 * 8 * 7 * 7,
        ),
        (  # depthwise: one input channel for each output channel
            (IMAGE, "f32[3,3,1,4]{3,2,1,0}"),
            "f32[2,3,3,4]{3,2,1,0} convolution(%a, %b), window={size=3x3}, "
            "dim_labels=b01f_01io->b01f, feature_group_count=4",
            2 * 2 * 1 * 4 * 9 * 9,
        ),
        (  # the gradient of a stride: between the 3 elements there are holes
            ("f32[2,3,1]{2,1,0}", "f32[3,1,2]{2,1,0}"),
            "f32[2,5,2]{2,1,0} convolution(%a, %b), window={size=3 pad=1_1 lhs_dilate=2}, "
            "dim_labels=b0f_0io->b0f",
            2 * 2 * 1 * 2 * 7,
        ),
        (  # a matrix product as a TPU writes it
            ("bf16[6,4]{1,0}", "bf16[4,8]{1,0}"),
            "f32[6,8]{1,0} convolution(%a, %b), dim_labels=bf_io->bf",
            2 * 6 * 4 * 8,
        ),
        (
            (IMAGE, KERNEL),
            f'({OUT}, u8[0]{{0}}) custom-call(%a, %b), {CUDNN}"__cudnn$convForward"',
            SAME,
        ),
        (
            (OUT, KERNEL),
            f'({IMAGE}, u8[0]{{0}}) custom-call(%a, %b), {CUDNN}"__cudnn$convBackwardInput"',
            SAME,
        ),
        (
            (IMAGE, OUT),
            f'({KERNEL}, u8[0]{{0}}) custom-call(%a, %b), {CUDNN}"__cudnn$convBackwardFilter"',
            SAME,
        ),
        (
            ("bf16[5,6,4]{2,1,0}", "bf16[5,4,8]{2,1,0}"),
            "bf16[5,6,8]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
            "rhs_batch_dims={0}, rhs_contracting_dims={1}",
            2 * 5 * 6 * 4 * 8,
        ),
        (
            ("bf16[6,4]{1,0}", "bf16[4,8]{1,0}"),
            '(bf16[6,8]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", '
            'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
            '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}',
            2 * 6 * 4 * 8,
        ),
        (
            ("bf16[6,4]{1,0}", "bf16[4,8]{1,0}"),
            "bf16[6,8]{1,0} fusion(%a, %b), kind=kCustom, calls=%product, "
            'backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}',
            2 * 6 * 4 * 8,
        ),
    ],
)
def test_flops_of_convolutions_and_products(operands, instruction, count):
    product = """%product (a: bf16[6,4], b: bf16[4,8]) -> bf16[6,8] {
      %a.1 = bf16[6,4]{1,0} parameter(0)
      %b.1 = bf16[4,8]{1,0} parameter(1)
      ROOT %d = bf16[6,8]{1,0} dot(%a.1, %b.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    }"""
    a, b = operands
    program = module(
        f"""%a = {a} parameter(0)
        %b = {b} parameter(1)
        ROOT %it = {instruction}""",
        product,
    )
    kernel = only(hlo.kernels(program))
    assert kernel.flops == Flops(matrix=count)
    assert kernel.matrix_dtype == a[: a.index("[")]


@pytest.mark.parametrize(
    "labels", ["batch_group_count=1", "dim_labels=b0_io->b0f", "dim_labels=b1f_1io->b1f"]
)
def test_a_convolution_whose_dimensions_are_not_named_is_named(labels):
    program = module(
        f"""%x = f32[2,5,1]{{2,1,0}} parameter(0)
        %k = f32[3,1,1]{{2,1,0}} parameter(1)
        ROOT %c = f32[2,3,1]{{2,1,0}} convolution(%x, %k), window={{size=3}}, {labels}"""
    )
    with pytest.raises(
        ValueError, match=r"line 5 of the HLO text: the dim_labels .* of 'c' do not"
    ):
        hlo.flops(program)


@pytest.mark.parametrize(
    ("instruction", "count"),
    [
        ("f32[4,8]{1,0} add(%x, %x)", Flops(elementwise=32)),
        ("bf16[4,8]{1,0} convert(%x)", Flops(elementwise=32)),
        ("f32[4,8]{1,0} exponential(%x)", Flops(transcendental=32)),
        ("f32[4,8]{1,0} copy(%x)", Flops()),
        ("f32[8,4]{1,0} transpose(%x), dimensions={1,0}", Flops()),
        ("f32[4]{0} reduce(%x, %z), dimensions={1}, to_apply=%sum", Flops(elementwise=28)),
        (
            "f32[4,6]{1,0} reduce-window(%x, %z), window={size=1x3}, to_apply=%sum",
            Flops(elementwise=48),
        ),
        (
            "f32[4,8]{1,0} select-and-scatter(%x, %y, %z), window={size=1x2 stride=1x2}, "
            "select=%sum, scatter=%sum",
            Flops(elementwise=16 + 16),
        ),
        ("f32[4,8]{1,0} all-reduce(%x), to_apply=%sum", Flops(elementwise=32)),
        ("f32[32]{0} sort(%flat), dimensions={0}, to_apply=%sum", Flops(elementwise=32 * 5)),
    ],
)
def test_other_operations(instruction, count):
    program = module(
        f"""%x = f32[4,8]{{1,0}} parameter(0)
        %y = f32[4,4]{{1,0}} parameter(1)
        %z = f32[] constant(0)
        %flat = f32[32]{{0}} bitcast(%x)
        ROOT %it = {instruction}""",
        ADD,
    )
    assert hlo.flops(program) == count


# Collectives


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2),
        ("replica_groups={}", 8),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['data'=4,'fsdp'=2] {'data'}", 4),
        ("replica_groups=mesh['data'=4,'fsdp'=2] {'data','fsdp'}", 8),
        ("replica_groups=mesh['data'=8] {'data':(2)4}", 4),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", 2),
    ],
)
def test_groups_of_a_collective(groups, size):
    program = module(
        f"""%x = f32[16]{{0}} parameter(0)
        ROOT %y = f32[16]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%sum""",
        ADD,
        header=", num_partitions=8",
    )
    assert only(hlo.collectives(program)).group_size == size


@pytest.mark.parametrize(
    ("instruction", "kind", "size", "sent"),
    [
        ("f32[16]{0} all-reduce(%x), replica_groups={{0,1,2,3}}", "all-reduce", 64, 96),
        ("f32[64]{0} all-gather(%x), replica_groups={{0,1,2,3}}", "all-gather", 256, 192),
        ("f32[4]{0} reduce-scatter(%x), replica_groups={{0,1,2,3}}", "reduce-scatter", 64, 48),
        ("f32[16]{0} all-to-all(%x), replica_groups={{0,1,2,3}}", "all-to-all", 64, 48),
        (
            "f32[16]{0} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
            "collective-permute",
            64,
            64,
        ),
    ],
)
def test_bytes_of_collectives(instruction, kind, size, sent):
    program = module(f"%x = f32[16]{{0}} parameter(0)\nROOT %y = {instruction}")
    assert only(hlo.collectives(program)) == hlo.Collective(kind, 1, size, 4, False)
    assert only(hlo.collectives(program)).sent_bytes == sent


def test_asynchronous_pairs_count_once_with_the_result_of_their_end():
    entry = """%x = f32[16]{0} parameter(0)
        %s = ((f32[16]{0}), f32[64]{0}) all-gather-start(%x), replica_groups={{0,1,2,3}}CONFIG
        %work = f32[16]{0} add(%x, %x)
        %d = f32[64]{0} all-gather-done(%s)
        %p = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%work),
          source_target_pairs={{0,1},{1,0}}
        %q = f32[16]{0} collective-permute-done(%p)
        %w = ((f32[16]{0}), f32[16]{0}, u32[]) async-start(%q), calls=%wrapped
        %u = ((f32[16]{0}), f32[16]{0}, u32[]) async-update(%w)
        %v = f32[16]{0} async-done(%u)
        ROOT %out = (f32[64]{0}, f32[16]{0}) tuple(%d, %v)"""
    wrapped = """%wrapped (a: f32[16]) -> f32[16] {
      %a.1 = f32[16]{0} parameter(0)
      ROOT %r = f32[16]{0} all-reduce(%a.1), replica_groups={{0,1,2,3}}, to_apply=%sum
    }"""
    program = module(entry.replace("CONFIG", ""), ADD, wrapped)
    assert hlo.collectives(program) == (
        hlo.Collective("all-gather", 1, 256, 4, True),
        hlo.Collective("collective-permute", 1, 64, 2, True),
        hlo.Collective("all-reduce", 1, 64, 4, True),
    )
    assert hlo.launches(program) == 4
    assert hlo.traffic(program) == Traffic(64 + 128 + 64 + 64, 256 + 64 + 64 + 64)
    # A GPU's pair may be a blocking one in disguise.
    config = ', backend_config={"collective_backend_config":{"is_sync":true}}'
    sync = module(entry.replace("CONFIG", config), ADD, wrapped)
    assert hlo.collectives(sync)[0] == hlo.Collective("all-gather", 1, 256, 4, False)


def test_collectives_in_loops_count_as_often_as_they_run():
    loop = LOOP.format(step=1, direction="LT", limit=6).replace(
        "fusion(%x), kind=kLoop, calls=%scaled", "all-reduce(%x), to_apply=%sum"
    )
    program = module(WHILE, ADD, loop, header=", replica_count=2")
    assert only(hlo.collectives(program)) == hlo.Collective("all-reduce", 6, 192, 2, False)


def test_collectives_that_a_tpu_fuses():
    """A chain of fusions carries one gather; an all-reduce and a slice are a reduce-scatter."""
    part = """%{name} (p: f32[16]) -> f32[64] {{
      %p = f32[16]{{0}} parameter(0)
      %g = f32[64]{{0}} all-gather(%p), channel_id=10, replica_groups={{{{0,1,2,3}}}}
      ROOT %c = f32[64]{{0}} custom-call(%g), custom_call_target="AsyncCollective{name}"
    }}"""
    scatter = """%all-reduce-scatter (p: f32[16]) -> f32[4] {
      %p = f32[16]{0} parameter(0)
      %zero = s32[] constant(0)
      %r = f32[16]{0} all-reduce(%p), channel_id=11, replica_groups={{0,1,2,3}}, to_apply=%sum
      ROOT %c = f32[4]{0} dynamic-slice(%r, %zero), dynamic_slice_sizes={4}
    }"""
    program = module(
        """%x = f32[16]{0} parameter(0)
        %a = f32[64]{0} fusion(%x), kind=kCustom, calls=%Start
        %b = f32[64]{0} fusion(%x), kind=kCustom, calls=%Done
        ROOT %y = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter""",
        ADD,
        part.format(name="Start"),
        part.format(name="Done"),
        scatter,
    )
    assert hlo.collectives(program) == (
        hlo.Collective("all-gather", 1, 256, 4, True),
        hlo.Collective("reduce-scatter", 1, 64, 4, False),
    )


# Memory

FORK = """
%fork (p: bf16[100]) -> (f32[100], bf16[100]) {
  %p.9 = bf16[100]{0} parameter(0)
  %wide = f32[100]{0} convert(%p.9), metadata={op_name="jvp(Net)/bn1/convert" source_file="net.py" source_line=9}
  %narrow = bf16[100]{0} negate(%p.9), metadata={op_name="jvp(Net)/neg"}
  ROOT %both = (f32[100]{0}, bf16[100]{0}) tuple(%wide, %narrow)
}
"""  # noqa: E501


def test_large_buffers_are_named_with_their_layer_and_line():
    program = module(
        """%x = bf16[100]{0} parameter(0), metadata={op_name="batch"}
        %f = (f32[100]{0}, bf16[100]{0}) fusion(%x), kind=kLoop, calls=%fork
        %wide.1 = f32[100]{0} get-tuple-element(%f), index=0
        %narrow.1 = bf16[100]{0} get-tuple-element(%f), index=1
        ROOT %out = (f32[100]{0}, bf16[100]{0}) tuple(%wide.1, %narrow.1)""",
        FORK,
    )
    wide, batch, narrow = hlo.large_buffers(program, 200)
    assert (wide.dtype, wide.array.dims, wide.bytes) == ("f32", (100,), 400)
    assert (wide.op_name, wide.source, wide.opcode) == (
        "jvp(Net)/bn1/convert",
        "net.py:9",
        "fusion",
    )
    assert (batch.op_name, batch.kind, batch.opcode) == ("batch", "arguments", "parameter")
    assert narrow.op_name == "jvp(Net)/neg"
    assert hlo.large_buffers(program, 201) == (wide,)


NESTED = """
%largest (q: f32[8,5]) -> ((f32[8], s32[8]), f32[8,5]) {
  %q.9 = f32[8,5]{1,0} parameter(0)
  %best = f32[8]{0} slice(%q.9), slice={[0:8], [0:1]}
  %place = s32[8]{0} iota(), iota_dimension=0
  %pair = (f32[8]{0}, s32[8]{0}) tuple(%best, %place)
  ROOT %both = ((f32[8]{0}, s32[8]{0}), f32[8,5]{1,0}) tuple(%pair, %q.9)
}
"""


def test_a_fusion_that_returns_a_tuple_of_tuples():
    """As a GPU's argmax beside an addition; each array has a buffer, under the fusion's name."""
    program = module(
        """%x = f32[8,5]{1,0} parameter(0), metadata={op_name="batch"}
        %f = ((f32[8]{0}, s32[8]{0}), f32[8,5]{1,0}) fusion(%x), kind=kInput, calls=%largest, metadata={op_name="reduce"}
        %first = (f32[8]{0}, s32[8]{0}) get-tuple-element(%f), index=0
        ROOT %index = s32[8]{0} get-tuple-element(%first), index=1""",  # noqa: E501
        NESTED,
    )
    made = [each for each in hlo.large_buffers(program, 1) if each.opcode == "fusion"]
    assert [(each.bytes, each.op_name) for each in made] == [
        (160, "reduce"),
        (32, "reduce"),
        (32, "reduce"),
    ]
    assert max(point.total for point in hlo.liveness(program).points) == 160 + 160 + 64


STEP = """
  %w = f32[100]{0} parameter(0), metadata={op_name="params"}
  %x = f32[50]{0} parameter(1), metadata={op_name="batch"}
  %a = f32[200]{0} custom-call(%x, %w), custom_call_target="t", metadata={op_name="jvp(f)/a"}
  %b = f32[300]{0} custom-call(%a), custom_call_target="t", metadata={op_name="jvp(f)/b"}
  %c = f32[10]{0} custom-call(%b), custom_call_target="t", metadata={op_name="jvp(f)/c"}
  %d = f32[100]{0} custom-call(%a, %c), custom_call_target="t", metadata={op_name="transpose(jvp(f))/d"}
  %e = f32[100]{0} add(%d, %d), metadata={op_name="mul"}
  %new = f32[100]{0} add(%w, %e), metadata={op_name="add"}
  ROOT %out = (f32[100]{0}, f32[10]{0}) tuple(%new, %c)
"""  # noqa: E501


@pytest.mark.parametrize(
    ("donated", "outputs_at_the_end"),
    [("", 110), (", input_output_alias={ {0}: (0, {}, may-alias) }", 10)],
)
def test_liveness_by_hand(donated, outputs_at_the_end):
    live = hlo.liveness(module(STEP, header=donated))
    by_name = {point.name: point for point in live.points}

    def words(name):
        now = by_name[name].live
        return tuple(now[kind] // 4 for kind in ("arguments", "activations", "temporaries"))

    assert [point.name for point in live.points] == [*"wxabcde", "new", "out"]
    assert words("w") == (150, 0, 0)
    assert words("a") == (150, 200, 0)  # a waits for the way back
    assert words("b") == (150, 200, 300)
    assert words("c") == (150, 200, 300)
    assert words("d") == (150, 200, 100)
    assert words("e") == (150, 0, 100)  # e lies where d died
    assert {name: point.live["outputs"] // 4 for name, point in by_name.items() if name > "b"} == {
        **dict.fromkeys(["w", "x"], 0),
        **dict.fromkeys(["c", "d", "e"], 10),
        "new": 10,  # it begins where e dies
        "out": outputs_at_the_end,
    }
    assert (live.peak.name, live.peak.op_name, live.peak.total) == ("c", "jvp(f)/c", 4 * 660)
    assert [each.name for each in live.at(4)] == ["b", "a", "w", "x", "c"]
    assert [(each.name, each.first, each.last) for each in live.buffers if each.name in "abc"] == [
        ("a", 2, 5),
        ("b", 3, 4),
        ("c", 4, 8),
    ]


def test_liveness_of_asynchronous_pairs_and_of_elements_that_nobody_reads():
    program = module(
        """%x = f32[10]{0} parameter(0)
        %y = f32[10]{0} custom-call(%x), custom_call_target="t"
        %s = ((f32[10]{0}), f32[40]{0}) all-gather-start(%y), replica_groups={{0,1,2,3}}
        %t = (f32[7]{0}, f32[3]{0}) custom-call(%x), custom_call_target="t"
        %u = f32[3]{0} get-tuple-element(%t), index=1
        %d = f32[40]{0} all-gather-done(%s)
        %vmem = f32[8,128]{1,0:T(8,128)S(1)} custom-call(%x), custom_call_target="t"
        ROOT %out = f32[1]{0} custom-call(%d, %u, %vmem), custom_call_target="t" """
    )
    temporaries = [point.live["temporaries"] // 4 for point in hlo.liveness(program).points]
    assert temporaries == [0, 10, 50, 60, 53, 53, 43, 43]


def test_a_loop_adds_the_peak_of_its_own_temporaries():
    loop = LOOP.format(step=1, direction="LT", limit=6).replace(
        "%y = f32[8]{0} fusion(%x), kind=kLoop, calls=%scaled",
        """%big = f32[800]{0} custom-call(%x), custom_call_target="t"
        %y = f32[8]{0} custom-call(%big), custom_call_target="t" """,
    )
    live = hlo.liveness(module(WHILE, loop))
    assert live.peak.name == "loop"
    # The counter's copy becomes an output; inside are 800 words and a constant.
    assert live.peak.live == {
        "arguments": 32,
        "constants": 4,
        "activations": 0,
        "temporaries": 3204,
        "outputs": 4,
    }


# Against XLA


def convolution(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=numbers).sum()


def softmax(x, _):
    return jax.nn.softmax(x.reshape(64, -1)).var(0)


def product(x, kernel):
    return jnp.tanh(x.reshape(64, -1) @ jnp.ones((384, 32))) * kernel.sum()


FUNCTIONS = [convolution, jax.grad(convolution, (0, 1)), softmax, product]
ARGUMENTS = (jnp.ones((8, 32, 32, 3)), jnp.ones((3, 3, 3, 16)))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_counts_are_those_of_xla(function):
    compiled = jax.jit(function).lower(*ARGUMENTS).compile()
    program = hlo.read(compiled.as_text())
    xla = compiled.cost_analysis()
    assert hlo.flops(program).total == pytest.approx(xla["flops"], rel=0.02)
    assert hlo.flops(program).transcendental == xla.get("transcendentals", 0)
    assert hlo.traffic(program).total == pytest.approx(xla["bytes accessed"], rel=0.02)


def test_buffers_of_a_compiled_function_name_their_layer_and_line():
    def layer(x):
        with jax.named_scope("stem"):
            return jnp.sort(x, axis=0)

    compiled = jax.jit(layer).lower(jnp.ones((64, 64))).compile()
    buffers = hlo.large_buffers(hlo.read(compiled.as_text()), 64 * 64 * 4)
    assert ("x", "arguments") in [(each.op_name, each.kind) for each in buffers]
    named = [each for each in buffers if "stem" in each.op_name]
    line = layer.__code__.co_firstlineno + 2
    assert any((__file__, line) == frame[:2] for each in named for frame in each.frames)


def test_a_scan_is_counted_as_often_as_it_runs_where_xla_counts_it_once():
    def steps(x, matrices):
        return jax.lax.scan(lambda x, matrix: (jnp.tanh(x @ matrix), None), x, matrices)[0]

    compiled = jax.jit(steps).lower(jnp.ones((64, 64)), jnp.ones((5, 64, 64))).compile()
    program = hlo.read(compiled.as_text())
    assert hlo.unknown_loops(program) == ()
    assert hlo.flops(program).matrix == 5 * 2 * 64**3
    assert hlo.flops(program).total == pytest.approx(
        5 * compiled.cost_analysis()["flops"], rel=0.02
    )


def test_the_peak_is_what_the_compiler_allots():
    def step(params, x):
        def loss(params):
            for each in params:
                x_ = jnp.tanh(x @ each)
            return jnp.sum(x_**2)

        return jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params))

    params = [jnp.ones((256, 256))] * 3
    compiled = jax.jit(step, donate_argnums=0).lower(params, jnp.ones((512, 256))).compile()
    memory = compiled.memory_analysis()
    allotted = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    assert hlo.liveness(hlo.read(compiled.as_text())).peak.total == pytest.approx(allotted, rel=0.1)
