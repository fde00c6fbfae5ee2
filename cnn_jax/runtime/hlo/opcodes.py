"""What the reader knows of HLO's operations and of the libraries that custom calls name."""

ELEMENTWISE = frozenset(
    {
        "abs",
        "add",
        "and",
        "ceil",
        "clamp",
        "clz",
        "compare",
        "complex",
        "convert",
        "count-leading-zeros",
        "divide",
        "floor",
        "imag",
        "is-finite",
        "maximum",
        "minimum",
        "multiply",
        "negate",
        "not",
        "or",
        "popcnt",
        "real",
        "reduce-precision",
        "remainder",
        "round-nearest-afz",
        "round-nearest-even",
        "select",
        "shift-left",
        "shift-right-arithmetic",
        "shift-right-logical",
        "sign",
        "stochastic-convert",
        "subtract",
        "xor",
    }
)
TRANSCENDENTAL = frozenset(
    {
        "acos",
        "acosh",
        "asin",
        "asinh",
        "atan2",
        "atanh",
        "cbrt",
        "cosh",
        "cosine",
        "erf",
        "exponential",
        "exponential-minus-one",
        "log",
        "log-plus-one",
        "logistic",
        "power",
        "rng",
        "rng-bit-generator",
        "rsqrt",
        "sine",
        "sinh",
        "sqrt",
        "tan",
        "tanh",
    }
)
WITHOUT_KERNEL = frozenset(
    {
        "add-dependency",
        "after-all",
        "bitcast",
        "constant",
        "domain",
        "get-tuple-element",
        "opt-barrier",
        "parameter",
        "partition-id",
        "recv-done",
        "replica-id",
        "send-done",
        "tuple",
    }
)
WITHOUT_KERNEL_TARGETS = frozenset(
    {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast"}
)
COLLECTIVES = frozenset(
    {
        "all-gather",
        "all-reduce",
        "all-to-all",
        "collective-broadcast",
        "collective-permute",
        "ragged-all-to-all",
        "reduce-scatter",
    }
)
# Which of the call's first operand, second operand and result a convolution's forward pass would
# name its input, its kernel and its output.
CUDNN_CONVOLUTIONS = {
    "__cudnn$convForward": (0, 1, 2),
    "__cudnn$convForwardGraph": (0, 1, 2),
    "__cudnn$convBiasActivationForward": (0, 1, 2),
    "__cudnn$convBackwardInput": (2, 1, 0),
    "__cudnn$convBackwardFilter": (0, 2, 1),
}
CUBLAS_PRODUCTS = frozenset({"__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8"})

IN_PLACE = ELEMENTWISE | TRANSCENDENTAL | {"all-reduce", "dynamic-update-slice", "scatter"}
SAME_BUFFER = frozenset(
    {"add-dependency", "bitcast", "domain", "get-tuple-element", "opt-barrier", "tuple", "while"}
)
