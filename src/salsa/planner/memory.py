"""Bytes of one rank, by part and phase, as `rl.py` and TRL's trainers hold them. No torch.

Every formula counts tensors that exist (docs/how-to/plan.md says how well that is measured); N ranks are planned as
FSDP2 places them: what is stored is divided by N, what computes is gathered a layer at a time, and the policy is whole
while it generates. P parameters, d hidden, f intermediate, V vocabulary; e bytes of an element while computing.
"""

from dataclasses import dataclass, replace

from salsa.config import RLConfig
from salsa.planner.shapes import Shape

FP32, BF16 = 4, 2
MOMENTS = 8
"""Two Adam moments in fp32."""
SLOTS = 64
"""`runtime.sampler.local.MAX_SEQUENCES`."""
SPARE_COLUMNS = 64
"""`runtime.packing.SPARE_COLUMNS`."""
SHORT = 2**22
"""`runtime.packing.SHORT`."""
LOGITS_CHUNK = 256
"""`models.language.LOGITS_CHUNK`."""
SCORING_TOKENS = 4096
"""`models.scalar.SCORING_TOKENS`."""


LIBRARIES = 0.5e9
"""Resident set of a process that has run, without tensors (benchmarks/planner.py, `baseline_mb`)."""
HEAP = 0.12
"""What glibc's heap holds on top of the tensors."""
HOLES = 0.75
"""Share of a pass's temporaries that stay in that heap as holes: it needs more than a tensor's size to align one."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of one phase."""

    weights: float = 0.0
    """Of what learns: fp32 masters, bf16 copies, layers that are gathered."""
    gradients: float = 0.0
    optimizer: float = 0.0
    frozen: float = 0.0
    """References, reward models, models that the KL is measured to."""
    activations: float = 0.0
    """What the backward pass needs, and the largest temporaries of a pass."""
    kv_cache: float = 0.0
    logits: float = 0.0
    process: float = 0.0
    """On a CPU: code and libraries, and what the heap holds between tensors."""

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Rank:
    """Where and how one rank computes."""

    precision: str
    """`fp32` or `bf16`."""
    world_size: int = 1
    on_cpu: bool = False

    @property
    def bytes(self) -> int:
        """e, of a weight or an activation while it computes."""
        return BF16 if self.precision == "bf16" else FP32


@dataclass(frozen=True)
class RLWork:
    """One RL run as memory sees it; lengths are those of its longest rows."""

    policy: Shape
    config: RLConfig
    prompt_tokens: int
    response_tokens: int
    references: int = 1
    """Models that the KL pulls towards, those not counted that share the policy's weights (LoRA)."""
    moves: bool = False
    """Whether the reference follows the policy: it has fp32 masters then."""
    reward: Shape | None = None
    """None where functions score."""
    monitored: bool = True
    """Whether the KL is measured to further models, one in memory at a time."""


@dataclass(frozen=True)
class Pass:
    """What one pass through a model sees."""

    tokens: int
    """N, distinct."""
    rows: int
    """B."""
    queries: int
    """Q, the most tokens that a row adds."""
    columns: int
    """T, the longest row."""
    by_kernel: bool = False
    """Whether torch's attention kernel always computes it; salsa's own makes small scores itself."""

    def scores(self, shape: Shape) -> int:
        """Attention scores of a layer that are in memory at once; 0 where a kernel never holds them all."""
        number = self.rows * shape.heads * self.queries * self.columns
        return 0 if self.by_kernel or number > SHORT else number


def rl_memory(work: RLWork, rank: Rank) -> dict[str, Memory]:
    """Phase → bytes of one rank: `rollout`, `experience`, `update`; `load` and `save` where they may need most."""
    shape, config, e = work.policy, work.config, rank.bytes
    stored = _stored(work, rank)
    length = work.prompt_tokens + work.response_tokens
    rows = -(-config.rollout_size // rank.world_size)
    micro = _micro_pass(work, rank)
    slots = min(SLOTS, rows)
    prompts = Pass(slots * work.prompt_tokens, slots, work.prompt_tokens, work.prompt_tokens)
    whole = shape.parameters * e if rank.world_size > 1 else 0
    rollout = replace(
        stored,
        weights=stored.weights + whole,
        activations=forward_bytes(shape, prompts, e),
        kv_cache=kv_cache_bytes(shape, slots, work.prompt_tokens, work.response_tokens, rank),
        logits=slots * shape.vocabulary * (4 * FP32 + 8 + (BF16 if e == BF16 else 0)),
    )
    scoring = 0.0
    if work.reward is not None:
        fitting = max(1, min(rows, SCORING_TOKENS // length))
        scoring = forward_bytes(work.reward, Pass(fitting * length, fitting, length, length), e)
    others = shape.parameters * e / rank.world_size if work.monitored else 0
    chunk = min(LOGITS_CHUNK, micro.rows * work.response_tokens)
    experience = replace(
        stored,
        frozen=stored.frozen + others,
        activations=max(forward_bytes(shape, micro, e), scoring),
        logits=chunk * shape.vocabulary * 4 * FP32,
    )
    learning = _trained(work)
    shared_head = config.algorithm == "ppo" and config.critic == "head"
    gradients = FP32 * (sum(learning) if shared_head else max(learning)) / rank.world_size
    if config.lora is None:  # the embedding's and the head's, before they are added up or scattered
        gradients += shape.embedding * (2 * e if shape.tied or rank.world_size > 1 else 0)
    again, lora = config.gradient_checkpointing, config.lora is not None
    passes = 2 if shared_head else 1  # its values are a second pass, differentiated with the first
    layers = 1 if again else passes * shape.layers
    holes = HOLES * layers * temporary_bytes(shape, micro, e, lora=lora)
    update = replace(
        stored,
        gradients=gradients,
        activations=training_bytes(shape, micro, e, recompute=again, lora=lora, passes=passes),
        process=holes if rank.on_cpu else 0.0,
        logits=chunk * shape.vocabulary * (3 * FP32 + (BF16 if e == BF16 else 0)),
    )
    phases = {"rollout": rollout, "experience": experience, "update": update}
    if config.lora is not None and not rank.on_cpu and rank.world_size == 1:
        # the base's fp32 masters leave the card only after the reference is loaded
        whole = shape.parameters * (FP32 + (BF16 if e == BF16 else 0))
        phases = {"load": Memory(weights=whole, frozen=stored.frozen)} | phases
    phases = {name: resident(one, rank) for name, one in phases.items()}
    if rank.on_cpu:  # whole weights, which fit where activations were: no further holes
        saving = replace(stored, activations=_saving_bytes(work), process=LIBRARIES)
        phases["save"] = saving
    return phases


def resident(memory: Memory, rank: Rank) -> Memory:
    """With what a process on a CPU holds besides tensors; a card's share for that is set aside by the hardware."""
    if not rank.on_cpu:
        return memory
    return replace(memory, process=memory.process + LIBRARIES + HEAP * memory.total)


def _saving_bytes(work: RLWork) -> float:
    """What writing the results makes: a fresh fp32 classifier for the critic, and the weights with adapters merged."""
    shape, config = work.policy, work.config
    critic = shape.trunk + shape.hidden if config.algorithm == "ppo" else 0
    return FP32 * (critic + (shape.matrices if config.lora is not None else 0))


def _micro_pass(work: RLWork, rank: Rank) -> Pass:
    """The largest pack of `microbatch_tokens`; rows are counted as if they shared nothing."""
    length = work.prompt_tokens + work.response_tokens
    rows = -(-work.config.minibatch // rank.world_size)
    rows = max(1, min(rows, work.config.microbatch_tokens // length))
    return Pass(rows * length, rows, length, length)


def _trained(work: RLWork) -> list[int]:
    """Parameters of each thing that learns: the policy and, with PPO, the critic."""
    shape, config = work.policy, work.config
    own = shape.parameters
    critic = shape.trunk + shape.hidden
    if config.lora is not None:
        own = shape.adapters(config.lora.rank, config.lora.target_modules)
        critic = own + shape.hidden
    if config.algorithm != "ppo":
        return [own]
    return [own, shape.hidden if config.critic == "head" else critic]


def _stored(work: RLWork, rank: Rank) -> Memory:
    """What is there in every phase."""
    shape, config, e = work.policy, work.config, rank.bytes
    learning = _trained(work)
    each = FP32 + (BF16 if e == BF16 and rank.world_size == 1 else 0)
    held = sum(learning) * each
    if config.lora is not None:
        held += shape.parameters * _frozen_base(rank)
    frozen = work.references * shape.parameters * (each if work.moves else e)
    if work.reward is not None:
        frozen += (work.reward.trunk + work.reward.hidden) * e
    return Memory(
        weights=held / rank.world_size + gathered_bytes(shape, rank),
        optimizer=MOMENTS * sum(learning) / rank.world_size,
        frozen=frozen / rank.world_size,
    )


def _frozen_base(rank: Rank) -> int:
    """Bytes of a parameter under adapters: a card's fp32 master is in the host's memory; shares of ranks are fp32."""
    if rank.world_size > 1:
        return FP32
    return rank.bytes + (FP32 if rank.on_cpu and rank.precision == "bf16" else 0)


def gathered_bytes(shape: Shape, rank: Rank) -> float:
    """What FSDP2 holds besides a rank's share: embedding and head, a layer, and the next one on its way."""
    if rank.world_size == 1:
        return 0.0
    root = shape.embedding * (1 if shape.tied else 2)
    return (root + 2 * shape.layer) * rank.bytes


def kv_cache_bytes(shape: Shape, slots: int, prompt: int, response: int, rank: Rank) -> float:
    """Keys and values of `slots` sequences; a slot doubles its columns when it is full. fp32 on a CPU."""
    columns, needed = prompt + SPARE_COLUMNS, prompt + response
    while columns < needed:
        columns += max(columns, needed - columns)
    size = FP32 if rank.on_cpu else rank.bytes
    return 2.0 * shape.layers * slots * columns * shape.kv_heads * shape.head_size * size


def layer_bytes(shape: Shape, one: Pass, e: int, *, lora: bool = False) -> float:
    """What autograd keeps of one layer.

    Of each norm its fp32 input, the normalised input (if the norm's weight learns) and the output; queries, keys,
    values, the attention weights (or of torch's kernel its output) and the attended values; of the MLP gate,
    silu(gate), up and their product.
    """
    d, size = shape.hidden, shape.head_size
    norms = 2 * one.tokens * d * (FP32 + e + (0 if lora else e))
    mlp = 4 * one.tokens * shape.intermediate * e
    queries = one.rows * one.queries * shape.heads * size
    keys = 2 * one.rows * one.columns * shape.kv_heads * size
    if scores := one.scores(shape):
        attention = queries + keys + scores
    else:  # keys and values are repeated for the groups
        attention = 2 * queries + keys * shape.heads // shape.kv_heads
    attended = one.tokens * shape.heads * size
    return norms + mlp + (attention + attended) * e


def temporary_bytes(shape: Shape, one: Pass, e: int, *, lora: bool) -> float:
    """What a pass of one layer makes and drops: of norms, rotary positions, copies to and from rows, adapters."""
    queries, keys = (
        one.tokens * heads * shape.head_size for heads in (shape.heads, shape.kv_heads)
    )
    adapted = 3 * one.tokens * sum(outputs for _, outputs in shape.linears.values()) if lora else 0
    made = 4 * one.tokens * shape.hidden + 10.5 * queries + 8.5 * keys + one.scores(shape)
    return (made + adapted) * e


def training_bytes(
    shape: Shape, one: Pass, e: int, *, recompute: bool, lora: bool, passes: int = 1
) -> float:
    """Activations of so many passes that are differentiated together, and temporaries of the layer where that is."""
    kept = layer_bytes(shape, one, e, lora=lora)
    passing = max(3 * one.tokens * shape.intermediate, 2 * one.scores(shape)) * e
    if recompute:
        return passes * shape.layers * one.tokens * shape.hidden * e + kept + passing
    return passes * shape.layers * kept + passing


def forward_bytes(shape: Shape, one: Pass, e: int) -> float:
    """The largest temporaries of a pass without gradients."""
    stream = 2 * one.tokens * shape.hidden * e
    mlp = 3 * one.tokens * shape.intermediate * e
    queries = one.rows * one.queries * shape.heads * shape.head_size
    keys = one.rows * one.columns * shape.kv_heads * shape.head_size
    attention = (2 * queries + 4 * keys + (2 * one.scores(shape) or 2 * queries)) * e
    return stream + max(mlp, attention)


def trainer_memory(
    shape: Shape, rank: Rank, rows: int, length: int, *, head: bool, frozen: Shape | None = None
) -> Memory:
    """One rank of TRL's trainers at its peak: fp32 weights, gradients and moments, bf16 by autocast.

    `rows` sequences of `length` tokens, padded, a pass. With a `head` logits are made, LOGITS_CHUNK at once. A `frozen`
    reference (DPO) is fp32 too.
    """
    e, count = rank.bytes, shape.parameters if head else shape.trunk + shape.hidden
    one = Pass(rows * length, rows, length, length, by_kernel=True)
    gathered = gathered_bytes(shape, rank)
    cast = BF16 if e == BF16 and rank.world_size == 1 else 0  # autocast keeps its copies for a pass
    stream = 6 * one.tokens * shape.hidden * shape.layers * (FP32 - e)  # between layers it is fp32
    peak = Memory(
        weights=count * (FP32 + cast) / rank.world_size + gathered,
        gradients=count * FP32 / rank.world_size
        + (2 * e * shape.embedding if rank.world_size > 1 else 0),
        optimizer=count * MOMENTS / rank.world_size,
        frozen=(frozen.parameters * FP32 / rank.world_size) if frozen is not None else 0,
        activations=training_bytes(shape, one, e, recompute=False, lora=False) + stream,
        logits=min(LOGITS_CHUNK, one.tokens) * shape.vocabulary * 4 * FP32 if head else 0,
    )
    return resident(peak, rank)
