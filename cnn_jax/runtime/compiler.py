"""What is asked of the compiler: settings by platform, a cache of programs, and right numbers.

Call `start_cache` before JAX compiles anything, and compile with `compile_program`.
"""

import contextlib
import dataclasses
import hashlib
import os
import platform as host
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from cnn_jax.errors import UserError
from cnn_jax.runtime.accelerators import ACCELERATORS
from cnn_jax.runtime.distributed import any_of, is_alone, is_shared
from cnn_jax.training.miscompile import may_be_wrong

Options = Mapping[str, bool | str]

YNN_FUSIONS = "xla_cpu_experimental_ynn_fusion_type"
"""The option that names what XLA hands to the library YNNPACK on the CPU."""

OPTIONS: Mapping[str, Options] = {
    # XLA's default keeps collectives where they stand; this overlaps them with computation.
    # https://docs.jax.dev/en/latest/gpu_performance_tips.html, and on in NVIDIA's own JAX images:
    # https://docs.nvidia.com/jax-toolbox/environment-variables
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "tpu": {},  # libtpu chooses by generation, and schedules this way without being asked
    # XLA's default but for convolutions, which it then divides among all cores by itself: YNNPACK
    # of jaxlib 0.10.2 has one core make 64 channels or fewer (docs/performance.md).
    "cpu": {YNN_FUSIONS: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"},
}
"""What XLA is told of each platform beyond its own defaults."""

OF_KINDS: Mapping[str, Options] = {
    # How much of the fast memory one fusion may use, by default 16 MiB: with 48 its tiles are
    # larger, and a convolution reads less of its input twice. A ResNet-50 step moves 0.9 of the
    # bytes and takes about twice as long to compile (docs/performance.md). Others train with as
    # much: https://github.com/marin-community/marin/pull/3053
    ACCELERATORS[name].kind: {"xla_tpu_scoped_vmem_limit_kib": "49152"}
    for name in ("v5e", "v5p")
}
"""What XLA is told of devices of one kind, beside that."""

DETERMINISTIC: Mapping[str, Options] = {
    # Without it cuDNN and the scatters of a gradient add up in whichever order they finish.
    "gpu": {"xla_gpu_deterministic_ops": True},
}
"""What makes two runs equal bit for bit, where XLA does not do so anyhow."""

FLOAT32_PRODUCTS: Mapping[str, str] = {"gpu": "TensorFloat-32 where it has it", "tpu": "bfloat16"}
"""How JAX's default precision multiplies float32 arrays, where that is not in float32."""

WITHOUT_FUSED_REDUCTIONS: Options = {
    YNN_FUSIONS: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
}
"""What cures a program that `may_be_wrong`: YNNPACK is left with single products only."""

FLAGS: Mapping[str, str] = {"tpu": "LIBTPU_INIT_ARGS"}
"""Environment variables with flags of a platform's compiler, beside XLA_FLAGS."""

ENVIRONMENT = ("XLA_FLAGS", *FLAGS.values())

CACHE_BYTES = 4 * 2**30

CACHE_HIT, CACHE_MISS = (f"/jax/compilation_cache/cache_{how}" for how in ("hits", "misses"))
"""Events of JAX's monitoring."""

KEPT, TRACED, NOT_KEPT = (f"/cnn_jax/programs/{how}" for how in ("kept", "traced", "not_kept"))
"""Events of JAX's monitoring, of `runtime.programs`: a program was found without tracing it, was
traced and kept, or was traced and not kept, and `why`."""

CONFIG: Any = jax.config  # a type checker does not know its attributes


@dataclasses.dataclass(frozen=True)
class CompilerSettings:
    """What programs for one platform are compiled with.

    Attributes:
      platform: tpu, gpu or cpu.
      options: names and values, for `compile_program`.
      unknown: options that this version of the compiler does not have; they are left out.
    """

    platform: str
    options: Options
    unknown: tuple[str, ...] = ()

    def describe(self) -> str:
        """Returns the settings in one line."""
        asked = [f"{name}={value}" for name, value in self.options.items()]
        left_out = [f"without {name}, which it does not know" for name in self.unknown]
        precision = CONFIG.jax_default_matmul_precision or FLOAT32_PRODUCTS.get(self.platform)
        products = f"float32 products in {precision or 'float32'}"
        return ", ".join([*(asked or ["XLA's defaults"]), *left_out, products])


def compiler_settings(
    platform: str | None = None, *, deterministic: bool = False, device: Any = None
) -> CompilerSettings:
    """Returns what to compile with for `platform`, by default that of JAX's default backend.

    Each option is first tried on an empty program, for `device` (of a described topology, say) or
    for the default one: a compiler does not know every option of every version. What XLA_FLAGS
    and LIBTPU_INIT_ARGS say of an option of `OPTIONS` and `OF_KINDS` stands.

    Raises ValueError for an unknown platform.
    """
    if platform is None:
        platform = str(jax.default_backend() if device is None else device.platform)
    if platform not in OPTIONS:
        raise ValueError(f"platform is {platform!r}; it must be one of {', '.join(OPTIONS)}")
    if device is None and platform == jax.default_backend():
        device = jax.local_devices()[0]
    wanted = dict(_wanted(platform, device))
    if deterministic:
        wanted |= DETERMINISTIC.get(platform, {})
    known = {name: value for name, value in wanted.items() if _is_known(name, value, device)}
    return CompilerSettings(platform, known, tuple(name for name in wanted if name not in known))


def wanted_options() -> Options:
    """Returns what `compiler_settings` tries for JAX's default device, without the time to try it.

    Together with the versions and the environment they decide what a program is compiled with.
    """
    return _wanted(jax.default_backend(), jax.local_devices()[0])


def _wanted(platform: str, device: Any) -> Options:
    kind = "" if device is None else str(device.device_kind)
    flags = " ".join(os.environ.get(name, "") for name in ENVIRONMENT).split()
    said = {flag.lstrip("-").partition("=")[0] for flag in flags}
    options = {**OPTIONS[platform], **OF_KINDS.get(kind, {})}
    return {name: value for name, value in options.items() if name not in said}


def told_by_environment() -> dict[str, str]:
    """Returns what this process's environment tells the compilers, but for what they dump."""
    told = {name: os.environ.get(name, "") for name in ENVIRONMENT}
    told["JAX_DEFAULT_MATMUL_PRECISION"] = CONFIG.jax_default_matmul_precision or ""
    return {
        name: " ".join(flag for flag in flags.split() if not flag.startswith("--xla_dump"))
        for name, flags in told.items()
    }


def _is_known(name: str, value: bool | str, device: Any) -> bool:
    sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)
    program = jax.jit(lambda: 0, out_shardings=sharding).lower()
    try:
        program.compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


def compile_program(
    lowered: jax.stages.Lowered, options: Options | None = None, *, name: str = "program"
) -> jax.stages.Compiled:
    """Returns the program, compiled with `options`, free of a known defect of XLA on the CPU.

    A program that has the mark of that defect is compiled again without the optimisation at
    fault; the others keep it. See `cnn_jax.training.miscompile`. The processes of a run compile the
    programs of one `name` in the same order, and all again where one has to.

    A program with convolutions of groups of channels keeps XLA's own choice of `YNN_FUSIONS`: those
    of 7x7 by single channels, as in ConvNeXt, take YNNPACK half the processor time.
    """
    options = _fitting(lowered, options or {})
    compiled = _compile(lowered, options)
    if _platform(compiled) == "cpu" and any_of(
        f"compiling again {name}", may_be_wrong(compiled.as_text() or "")
    ):
        compiled = _compile(lowered, {**options, **_without_fused_reductions(options)})
        if may_be_wrong(compiled.as_text() or ""):
            raise UserError(
                "XLA compiles this program for the CPU in a way that can compute wrong numbers "
                "(https://github.com/jax-ml/jax/issues/39103), and no option cures it. Train on "
                "another platform or install another version of jaxlib"
            )
    return compiled


def unseen_options(lowered: jax.stages.Lowered) -> Options:
    """Returns what to compile a program for CPUs with where nobody sees what comes of it.

    It is free of what `compile_program` looks for: for an exported network, say.
    """
    return _without_fused_reductions(_fitting(lowered, OPTIONS["cpu"]))


def _fitting(lowered: jax.stages.Lowered, options: Options) -> dict[str, bool | str]:
    """Returns those of the options that are for this program."""
    fitting = dict(options)
    if YNN_FUSIONS in fitting and _has_groups(lowered):
        del fitting[YNN_FUSIONS]
    return fitting


def _without_fused_reductions(options: Options) -> Options:
    """Returns what cures a program that was compiled with these options, and leaves the rest."""
    if YNN_FUSIONS not in options:
        return WITHOUT_FUSED_REDUCTIONS
    kinds = str(options[YNN_FUSIONS]).split(",")
    return {YNN_FUSIONS: ",".join(kind for kind in kinds if not kind.endswith("_REDUCE"))}


def _has_groups(lowered: jax.stages.Lowered) -> bool:
    """Returns whether the program has a convolution of groups of channels."""
    module: Any = lowered.compiler_ir()
    text = module.operation.get_asm(large_elements_limit=16)  # without the weights of an export
    return re.search(r"feature_group_count = (?!1\b)", text) is not None


_read_from_cache: weakref.WeakSet[jax.stages.Compiled] = weakref.WeakSet()


def was_read_from_cache(compiled: jax.stages.Compiled) -> bool:
    """Returns whether a program of `compile_program` is one that JAX's compilation cache had."""
    return compiled in _read_from_cache


def _compile(lowered: jax.stages.Lowered, options: Options) -> jax.stages.Compiled:
    with _cache_hits() as hits:
        compiled = lowered.compile(compiler_options=dict(options))
    if hits:
        _read_from_cache.add(compiled)
    return compiled


@contextlib.contextmanager
def _cache_hits() -> Iterator[list[str]]:
    """Yields a list that grows with each program that this thread has from the cache."""
    thread, hits = threading.get_ident(), []

    def listen(event: str, **details: Any) -> None:
        del details
        if event == CACHE_HIT and threading.get_ident() == thread:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


def _platform(compiled: jax.stages.Compiled) -> str:
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    return next(iter(shardings[0].device_set)).platform if shardings else jax.default_backend()


class CompilationCounter:
    """Counts the programs of this process that came from the cache, and those that did not.

    Attributes:
      hits: programs that were read.
      misses: programs that were compiled, and kept for the next time.
      untraced: programs that were read without being traced, see `runtime.programs`; no hits.
      traced: programs that the next start need not trace; hits or misses as well.
      why_not: why the next start has to trace a program, if there is one.
    """

    def __init__(self) -> None:
        self.why_not = ""
        self._counts = {"hits": 0, "misses": 0, "untraced": 0, "traced": 0}
        self._lock = threading.Lock()
        jax.monitoring.register_event_listener(self._listen)

    @property
    def hits(self) -> int:
        return self._counts["hits"]

    @property
    def misses(self) -> int:
        return self._counts["misses"]

    @property
    def untraced(self) -> int:
        return self._counts["untraced"]

    @property
    def traced(self) -> int:
        return self._counts["traced"]

    def as_dict(self) -> dict[str, int | str]:
        """Returns the numbers, to write."""
        return {
            "from the cache": self.hits,
            "compiled": self.misses,
            "without tracing": self.untraced,
            "traced for the next start": self.traced,
            "why not kept": self.why_not,
        }

    def describe(self) -> str:
        """Returns how many programs an earlier start had made; nothing where there are none."""
        kept = self.hits + self.untraced
        said = f"{kept} of {kept + self.misses} programs were kept"
        untraced = f", {self.untraced} of them not even traced" if self.untraced else ""
        return f"{said}{untraced}" if kept + self.misses else ""

    def _listen(self, event: str, **details: Any) -> None:
        if event == NOT_KEPT:
            self.why_not = details["why"]
        kind = {
            CACHE_HIT: "hits",
            CACHE_MISS: "misses",
            KEPT: "untraced",
            TRACED: "traced",
        }.get(event)
        if kind:
            with self._lock:
                self._counts[kind] += 1


def start_cache(log: Callable[[str], None]) -> str | None:
    """Makes JAX keep compiled programs, small ones too, in a directory of this user.

    Returns the directory, or None where there is none: JAX_ENABLE_COMPILATION_CACHE=false, or it
    cannot be used, which is said to `log`. What the user has told JAX itself, by
    JAX_COMPILATION_CACHE_DIR and the like, holds; of the package's own directory, the programs
    used longest ago go when they take more than 4 GiB.

    The programs are machine code that JAX runs unseen: a directory that others may write to is
    not used.
    """
    if not CONFIG.jax_enable_compilation_cache:
        return None
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or CONFIG.jax_compilation_cache_dir:
        directory = CONFIG.jax_compilation_cache_dir
    else:
        own = _cache_directory()
        problem = _problem_with(own)
        if problem:
            log(f"programs are compiled anew each time, as {own} {problem}")
            return None
        _drop_unfinished(own)
        _replace_damaged(own, log)
        directory = str(own)
        jax.config.update("jax_compilation_cache_dir", directory)
        _unless_told("jax_compilation_cache_max_size", CACHE_BYTES)
    if not directory:
        return None
    _unless_told("jax_persistent_cache_min_compile_time_secs", 0.0)
    _unless_told("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory


def use_cache_together() -> None:
    """Turns JAX's cache off in a run of processes that would not all find the same there.

    JAX writes it from process 0 alone. Where others do not see its directory, process 0 reads a
    program that they compile; on GPUs they then wait for the kernels that are its part to try, by
    XLA's patience a day (https://github.com/marin-community/marin/issues/9042). On CPUs programs
    have another key in each process. `runtime.programs` keeps those of all.

    Call it before JAX compiles anything.
    """
    if is_alone():
        return
    # All ask, whatever their platform: the others would wait for one that does not.
    shared = is_shared(CONFIG.jax_compilation_cache_dir or "")
    if not shared or jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)


def processor() -> str:
    """Returns the kind of this machine's processor: code for one need not run on another."""
    described = host.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^(?:flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.M)
        described += found[0] if found else ""
    return f"{host.machine()}-{hashlib.sha256(described.encode()).hexdigest()[:8]}"


def _cache_directory() -> Path:
    """Returns where programs for this kind of machine are kept: homes are shared by several."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(home if os.path.isabs(home) else Path.home() / ".cache")
    return cache / "cnn_jax" / "xla" / processor()


def _problem_with(directory: Path) -> str:
    """Makes the directory; returns what is wrong with it, or an empty string."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = directory.stat()
    except OSError as error:
        return f"cannot be used: {error.strerror}"
    if not os.access(directory, os.W_OK | os.X_OK):
        return "cannot be written to"
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        return "can be written to by others"
    return ""


def _drop_unfinished(directory: Path) -> None:
    """Deletes programs whose writing was cut short; JAX 0.10.2 writes no others beside one.

    JAX writes a program and then its time stamp, with a lock held.
    """
    import filelock

    with (
        contextlib.suppress(OSError, filelock.Timeout),
        filelock.FileLock(directory / ".lockfile", timeout=1),
    ):
        for program in directory.glob("*-cache"):
            stamp = program.with_name(program.name.removesuffix("-cache") + "-atime")
            if not stamp.exists():
                program.unlink(missing_ok=True)


def _unless_told(name: str, value: float) -> None:
    if name.upper() not in os.environ:
        jax.config.update(name, value)


def _replace_damaged(directory: Path, log: Callable[[str], None]) -> None:
    """Says in one line what JAX warns of, and lets it replace a program that cannot be read.

    JAX compiles such a program again and by itself keeps the damaged one.
    """
    show = warnings.showwarning
    told = re.compile(
        r"Error (reading|writing) persistent compilation cache entry for '(.+?)': (\w+).*",
        re.DOTALL,
    )

    def replace(message: Warning | str, *details: Any, **others: Any) -> None:
        found = told.match(str(message))
        if not found:
            show(message, *details, **others)
            return
        action, name, error = found.groups()
        if action == "reading" and error != "Timeout":  # of the lock: the program may be good
            with contextlib.suppress(OSError):
                for program in directory.glob(f"{name}-*-cache"):
                    program.unlink()
        log(f"the compilation cache fails at {action} {name}, which is compiled ({error})")

    warnings.showwarning = replace
