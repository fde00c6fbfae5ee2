"""What is published of the accelerators that a step can be compiled for: one table, by name.

Rates are peaks of dense arithmetic, never "with sparsity". Everything is counted for one JAX
device: a whole GPU, a whole TPU chip from v4 to v6e, one of the two cores of a v3 chip, and one of
the two chiplets of a tpu7x chip.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the CUDA compiler asks of a device, besides its memory.

    Attributes:
      compute_capability: major and minor number of the architecture.
      multiprocessors: how many.
      fpus_per_multiprocessor: float32 fused multiply-adds in one clock.
      threads_per_multiprocessor: resident threads, at most.
      shared_memory_per_multiprocessor, shared_memory_per_block: bytes; for a block, at most.
      l2_cache: bytes.
      clock_ghz: the highest clock.
    """

    compute_capability: tuple[int, int]
    multiprocessors: int
    fpus_per_multiprocessor: int
    threads_per_multiprocessor: int
    shared_memory_per_multiprocessor: int
    shared_memory_per_block: int
    l2_cache: int
    clock_ghz: float


@dataclasses.dataclass(frozen=True)
class Tpu:
    """How chips form a slice.

    Attributes:
      axes: of the torus, 2 or 3.
      chips_per_pod: the largest slice. With two axes it alone has links that wrap around; with
        three, every slice of whole cubes of 4 x 4 x 4 has.
      devices_per_chip: what JAX sees of one chip.
      megacore: whether the chip's two cores are one device.
    """

    axes: int
    chips_per_pod: int
    devices_per_chip: int = 1
    megacore: bool = False


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One kind of device; `None` where nothing is published or where it depends on the machine.

    Attributes:
      kind: what JAX calls such a device (`device.device_kind`).
      platform: "tpu", "cuda" or "cpu".
      memory: bytes that programs can have: what the driver (GPU) or the compiler (TPU) admits,
        somewhat less than what is sold.
      memory_bandwidth: bytes a second.
      bfloat16_rate, float16_rate, float32_rate: floating-point operations a second in matrix
        products and convolutions, a multiply-add being two. float32 at JAX's default precision:
        TF32 on NVIDIA's since Ampere, one bfloat16 pass on TPUs.
      links: to other devices, this device's share of its chip's. A TPU has two for each axis.
      link_bandwidth: bytes a second over one link in one direction.
      devices_per_host: on a full host.
      sources: public documents that the numbers are from.
      gpu, tpu: what only one of the two families has.
    """

    kind: str
    platform: str
    sources: tuple[str, ...]
    memory: int | None = None
    memory_bandwidth: float | None = None
    bfloat16_rate: float | None = None
    float16_rate: float | None = None
    float32_rate: float | None = None
    links: int | None = None
    link_bandwidth: float | None = None
    devices_per_host: int | None = None
    gpu: Gpu | None = None
    tpu: Tpu | None = None


AMPERE = Gpu(
    compute_capability=(8, 0),
    multiprocessors=108,
    fpus_per_multiprocessor=64,
    threads_per_multiprocessor=2048,
    shared_memory_per_multiprocessor=164 * 1024,
    shared_memory_per_block=163 * 1024,
    l2_cache=40 * 2**20,
    clock_ghz=1.41,
)
HOPPER = Gpu(
    compute_capability=(9, 0),
    multiprocessors=132,
    fpus_per_multiprocessor=128,
    threads_per_multiprocessor=2048,
    shared_memory_per_multiprocessor=228 * 1024,
    shared_memory_per_block=227 * 1024,
    l2_cache=50 * 2**20,
    clock_ghz=1.98,
)

XLA = "https://github.com/openxla/xla/blob/main/xla/backends/gpu/target_config/specs"
CUDA_LIMITS = (
    "NVIDIA, CUDA C++ Programming Guide, compute capabilities, "
    "https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities"
)
TPU_MEMORY = "memory: the `available HBM` of libtpu 0.0.42 and 0.0.50 where a program does not fit"

ACCELERATORS: dict[str, Accelerator] = {
    "a100-40gb": Accelerator(
        kind="NVIDIA A100-SXM4-40GB",
        platform="cuda",
        memory=42_331_013_120,
        memory_bandwidth=1.5552e12,
        bfloat16_rate=312e12,
        float16_rate=312e12,
        float32_rate=156e12,
        links=12,
        link_bandwidth=25e9,
        devices_per_host=8,
        gpu=AMPERE,
        sources=(
            "NVIDIA A100 Tensor Core GPU Architecture, "
            "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf",
            f"{XLA}/a100_sxm_40.txtpb",
        ),
    ),
    "a100-80gb": Accelerator(
        kind="NVIDIA A100-SXM4-80GB",
        platform="cuda",
        memory=85_100_068_864,
        memory_bandwidth=2.03904e12,
        bfloat16_rate=312e12,
        float16_rate=312e12,
        float32_rate=156e12,
        links=12,
        link_bandwidth=25e9,
        devices_per_host=8,
        gpu=AMPERE,
        sources=(
            "NVIDIA A100 Tensor Core GPU datasheet, "
            "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-nvidia-us-2188504-web.pdf",
            f"{XLA}/a100_sxm_80.txtpb",
        ),
    ),
    "h100": Accelerator(
        kind="NVIDIA H100 80GB HBM3",
        platform="cuda",
        memory=84_942_979_072,
        memory_bandwidth=3.35232e12,
        bfloat16_rate=989.4e12,
        float16_rate=989.4e12,
        float32_rate=494.7e12,
        links=18,
        link_bandwidth=25e9,
        devices_per_host=8,
        gpu=HOPPER,
        sources=(
            "NVIDIA H100 Tensor Core GPU Architecture (SXM5), "
            "https://resources.nvidia.com/en-us-hopper-architecture/nvidia-h100-tensor-c",
            f"{XLA}/h100_sxm.txtpb",
        ),
    ),
    "h200": Accelerator(
        kind="NVIDIA H200",
        platform="cuda",
        # As a card shows them (jax 0.11.2, driver 580.159.04); XLA's own description has 141 GiB
        # and the cache of an H100.
        memory=150_109_880_320,
        memory_bandwidth=4.8e12,
        bfloat16_rate=989.4e12,
        float16_rate=989.4e12,
        float32_rate=494.7e12,
        links=18,
        link_bandwidth=25e9,
        devices_per_host=8,
        gpu=dataclasses.replace(HOPPER, l2_cache=60 * 2**20),
        sources=(
            "NVIDIA H200 Tensor Core GPU (SXM), https://www.nvidia.com/en-us/data-center/h200/",
            f"{XLA}/h200.txtpb",
        ),
    ),
    "b200": Accelerator(
        kind="NVIDIA B200",
        platform="cuda",
        memory=191_514_411_008,
        # 7680 bits at 3.996 GHz, as CUDA shows; the datasheet rounds to 8 TB/s.
        memory_bandwidth=7.67232e12,
        bfloat16_rate=2.25e15,
        float16_rate=2.25e15,
        float32_rate=1.1e15,
        links=18,
        link_bandwidth=50e9,
        devices_per_host=8,
        gpu=Gpu(
            compute_capability=(10, 0),
            multiprocessors=148,
            fpus_per_multiprocessor=128,
            threads_per_multiprocessor=2048,
            shared_memory_per_multiprocessor=228 * 1024,
            shared_memory_per_block=227 * 1024,
            l2_cache=132_644_864,
            clock_ghz=1.965,
        ),
        sources=(
            "NVIDIA Blackwell Architecture Technical Brief (HGX B200), "
            "https://resources.nvidia.com/en-us-blackwell-architecture",
            f"{XLA}/b200.txtpb",
        ),
    ),
    "l4": Accelerator(
        kind="NVIDIA L4",
        platform="cuda",
        memory=23_612_293_120,
        memory_bandwidth=300e9,
        bfloat16_rate=121e12,
        float16_rate=121e12,
        float32_rate=60e12,
        links=1,  # PCIe 4.0 x16
        link_bandwidth=32e9,
        devices_per_host=8,
        gpu=Gpu(
            compute_capability=(8, 9),
            multiprocessors=58,
            fpus_per_multiprocessor=128,
            threads_per_multiprocessor=1536,
            shared_memory_per_multiprocessor=100 * 1024,
            shared_memory_per_block=99 * 1024,
            l2_cache=48 * 2**20,
            clock_ghz=2.04,
        ),
        sources=(
            "NVIDIA L4 Tensor Core GPU (its rates are with sparsity, twice these), "
            "https://www.nvidia.com/en-us/data-center/l4/",
            CUDA_LIMITS,
        ),
    ),
    "t4": Accelerator(
        kind="Tesla T4",
        platform="cuda",
        memory=15_843_721_216,
        memory_bandwidth=320e9,
        # Turing's matrix units know float16 only; the others run on the float32 units.
        bfloat16_rate=8.1e12,
        float16_rate=65e12,
        float32_rate=8.1e12,
        links=1,  # PCIe 3.0 x16
        link_bandwidth=16e9,
        devices_per_host=4,
        gpu=Gpu(
            compute_capability=(7, 5),
            multiprocessors=40,
            fpus_per_multiprocessor=64,
            threads_per_multiprocessor=1024,
            shared_memory_per_multiprocessor=64 * 1024,
            shared_memory_per_block=64 * 1024,
            l2_cache=4 * 2**20,
            clock_ghz=1.59,
        ),
        sources=(
            "NVIDIA T4 Tensor Core GPU datasheet, "
            "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf",
            "NVIDIA Turing GPU Architecture, "
            "https://images.nvidia.com/aem-dam/en-zz/Solutions/design-visualization/technologies/turing-architecture/NVIDIA-Turing-Architecture-Whitepaper.pdf",
            CUDA_LIMITS,
        ),
    ),
    "v3": Accelerator(
        kind="TPU v3",
        platform="tpu",
        memory=int(15.48 * GIB),  # of 16 GiB
        memory_bandwidth=900e9 / 2,
        bfloat16_rate=123e12 / 2,
        float32_rate=123e12 / 2,
        links=4,
        link_bandwidth=70e9 / 2,  # two devices share the four links of their chip
        devices_per_host=8,
        tpu=Tpu(axes=2, chips_per_pod=1024, devices_per_chip=2),
        sources=(
            "Google Cloud, TPU v3, https://docs.cloud.google.com/tpu/docs/v3",
            "Jouppi et al., TPU v4, 2023, table 4 (links), https://arxiv.org/abs/2304.01433",
            TPU_MEMORY,
        ),
    ),
    "v4": Accelerator(
        kind="TPU v4",
        platform="tpu",
        memory=int(30.75 * GIB),  # of 32 GiB
        memory_bandwidth=1200e9,
        bfloat16_rate=275e12,
        float32_rate=275e12,
        links=6,
        link_bandwidth=50e9,
        devices_per_host=4,
        tpu=Tpu(axes=3, chips_per_pod=4096, megacore=True),
        sources=(
            "Google Cloud, TPU v4, https://docs.cloud.google.com/tpu/docs/v4",
            "Jouppi et al., TPU v4, 2023, table 4 (links), https://arxiv.org/abs/2304.01433",
            TPU_MEMORY,
        ),
    ),
    "v5e": Accelerator(
        kind="TPU v5 lite",
        platform="tpu",
        memory=int(15.75 * GIB),  # of 16 GiB
        memory_bandwidth=819e9,
        bfloat16_rate=197e12,
        float32_rate=197e12,
        links=4,
        link_bandwidth=50e9,
        devices_per_host=4,
        tpu=Tpu(axes=2, chips_per_pod=256),
        sources=(
            "Google Cloud, TPU v5e, https://docs.cloud.google.com/tpu/docs/v5e",
            TPU_MEMORY,
        ),
    ),
    "v5p": Accelerator(
        kind="TPU v5",
        platform="tpu",
        memory=int(95.73 * GIB),
        memory_bandwidth=2765e9,
        bfloat16_rate=459e12,
        float32_rate=459e12,
        links=6,
        link_bandwidth=100e9,
        devices_per_host=4,
        tpu=Tpu(axes=3, chips_per_pod=8960, megacore=True),
        sources=(
            "Google Cloud, TPU v5p, https://docs.cloud.google.com/tpu/docs/v5p",
            TPU_MEMORY,
        ),
    ),
    "v6e": Accelerator(
        kind="TPU v6 lite",
        platform="tpu",
        memory=int(31.24 * GIB),  # of 32 GiB
        memory_bandwidth=1638e9,
        bfloat16_rate=918e12,
        float32_rate=918e12,
        links=4,
        link_bandwidth=100e9,
        devices_per_host=4,
        tpu=Tpu(axes=2, chips_per_pod=256),
        sources=(
            "Google Cloud, TPU v6e, https://docs.cloud.google.com/tpu/docs/v6e",
            TPU_MEMORY,
        ),
    ),
    "tpu7x": Accelerator(
        kind="TPU7x",
        platform="tpu",
        memory=int(94.74 * GIB),  # of 96 GiB
        memory_bandwidth=7380e9 / 2,
        bfloat16_rate=2307e12 / 2,
        float32_rate=2307e12 / 2,
        links=6,
        link_bandwidth=100e9 / 2,  # two devices share the six links of their chip
        devices_per_host=8,
        tpu=Tpu(axes=3, chips_per_pod=9216, devices_per_chip=2),
        sources=(
            "Google Cloud, TPU7x (Ironwood), https://docs.cloud.google.com/tpu/docs/tpu7x",
            TPU_MEMORY,
        ),
    ),
    "cpu": Accelerator(kind="cpu", platform="cpu", sources=()),
}


def gpu_target_config(accelerator: Accelerator) -> str:
    """Returns the GPU as a text of XLA's `stream_executor.GpuTargetConfigProto`.

    Versions of driver, runtime and cuDNN are those of XLA's own descriptions of the same cards.
    """
    gpu = accelerator.gpu
    if gpu is None or accelerator.memory_bandwidth is None:
        raise ValueError(f"{accelerator.kind}: must be a GPU")
    major, minor = gpu.compute_capability
    # "sm_90a" and above: instructions such as wgmma that later generations do not keep.
    extension = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory_per_multiprocessor}
  shared_memory_per_block_optin: {gpu.shared_memory_per_block}
  threads_per_core_limit: {gpu.threads_per_multiprocessor}
  core_count: {gpu.multiprocessors}
  fpus_per_core: {gpu.fpus_per_multiprocessor}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {round(accelerator.memory_bandwidth)}
  l2_cache_size: {gpu.l2_cache}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {accelerator.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{accelerator.kind}"
"""
