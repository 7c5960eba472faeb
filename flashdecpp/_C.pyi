# The names of the extension that the package uses; the tests use others, untyped.
from enum import Enum

MAX_NEW_TOKENS: int
MAX_HEAD_DIM: int
MAX_QUERY_GROUP: int
MAX_STREAMED_ROWS: int

def build_info() -> dict[str, str]: ...

class DType(Enum):
    float32 = 0
    float16 = 1
    bfloat16 = 2
    def __int__(self) -> int: ...

class DeviceProperties:
    @property
    def name(self) -> str: ...
    @property
    def arch(self) -> int: ...
    @property
    def num_sms(self) -> int: ...
    @property
    def warp_size(self) -> int: ...
    @property
    def has_tma(self) -> bool: ...
    @property
    def has_clusters(self) -> bool: ...
    @property
    def has_wgmma(self) -> bool: ...
    @property
    def has_pdl(self) -> bool: ...

def nvidia_device(
    name: str,
    arch: int,
    num_sms: int,
    shared_bytes_per_sm: int,
    *,
    generic: bool = False,
    sm_90: bool = True,
    sm_90a: bool = True,
) -> DeviceProperties: ...
def amd_device(name: str, target: int, num_cus: int, warp_size: int) -> DeviceProperties: ...

class InflectionPoints:
    def __init__(self, m1: int, m2: int) -> None: ...
    @property
    def m1(self) -> int: ...
    @property
    def m2(self) -> int: ...

def default_inflection_points(device: DeviceProperties) -> InflectionPoints: ...

class AttentionProblem:
    def __init__(
        self,
        *,
        batch: int,
        q_len: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        block_size: int = 0,
        num_splits: int = 0,
        kv_bytes: int = 2,
        suits_tma: bool = True,
    ) -> None: ...

class AttentionConfig: ...

def choose_attention(problem: AttentionProblem, device: DeviceProperties) -> AttentionConfig: ...
