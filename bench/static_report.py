"""Facts about the row kernel without a GPU, and a prediction of the head's time from them.

    python -m bench.static_report [--arch 80 90 100] [--json PATH]

The facts are read from machine code for sm_80, sm_90 and sm_100. Per variant and architecture:
registers, spilled bytes, shared memory, the narrowest global load and store of the sweeps over the
vocabulary, ex2 instructions and all instructions per element. The exit status is 1 if a rule of
RULES is broken.

The prediction adds up the waves of GEMM tiles, the bytes that no GEMM hides and the row pass. A
sweep of the row pass takes the longest of its memory traffic, its busiest unit and its latencies.
What the prediction assumes stands in CARDS and ASSUMED. No GPU has confirmed it. The last line is
JSON.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path

from bench.harness import command_line, markdown
from drgrpo.kernels import linear_drgrpo as head

RULES = (
    "no spills, no stack",
    "every load and store of a sweep is 128 bits wide or wider",
    "at most one ex2 per element and sweep",
    "two programs fit an SM's registers, or one of 32 warps",
    "a barrier between load and store exactly where they touch each other's elements",
)

BF16 = dict(z="bf16", dz="bf16")
FLAGS = dict(LOSS=True, GRAD=True, HAS_OLD=False, HAS_SAMPLER=False, HAS_REF=False)
VARIANTS = {  # what differs in the sweeps; the flags of the per-token part do not
    "on-policy": BF16,
    "off-policy, TIS, k3": BF16 | dict(HAS_OLD=True, HAS_SAMPLER=True, HAS_REF=True),
    "fp16": dict(z="fp16", dz="fp16", HAS_OLD=True),
    "fp32": dict(z="fp32", dz="fp32", HAS_OLD=True),
    "fp32 logits, bf16 gradient": dict(z="fp32", dz="bf16", HAS_OLD=True),
    "loss without gradient": BF16 | dict(GRAD=False),
    "log-prob": BF16 | dict(LOSS=False, GRAD=False),
    "log-prob, fp32 logits": dict(z="fp32", dz="fp32", LOSS=False, GRAD=False),
    "odd vocabulary": BF16 | dict(odd=True),
}


UNITS = {  # instructions, and lanes of an SM that take one a clock, by architecture
    "issue": ("", {80: 128, 90: 128, 100: 128}),
    "FMA": ("F(ADD|MUL|FMA)|FHADD|IMAD", {80: 64, 90: 128, 100: 128}),
    "ALU": ("SHF|LOP3|IADD3|LEA|PRMT|PLOP3|MOV|I?F?SETP|SEL|FSEL|FMNMX", {80: 64, 90: 64, 100: 64}),
    "ex2": ("MUFU", {80: 16, 90: 16, 100: 16}),
    "convert": ("F2F", {80: 16, 90: 16, 100: 16}),
}
"""Lanes are those of the CUDA programming guide. Its table is silent on conversions of pairs."""


@dataclass(frozen=True)
class Sweep:
    """One loop over the vocabulary, in SASS. `elements` counts those of one thread in one turn."""

    kind: str  # "read", "read+write", "write"
    elements: int
    instructions_per_element: float
    ex2_per_element: float
    load_bits: int  # narrowest; 0: none
    store_bits: int
    barriers: int
    units: dict[str, float] = field(default_factory=dict)  # instructions per element, by UNITS

    def clocks(self, arch: int) -> float:
        """Clocks of an SM's busiest unit per element."""
        counts = {"issue": self.instructions_per_element} | self.units
        return max(count / UNITS[unit][1][arch] for unit, count in counts.items())

    def describe(self) -> str:
        counts = f"{self.ex2_per_element:g}, {self.instructions_per_element:.1f}"
        return f"{self.load_bits}/{self.store_bits}, {counts}"


@dataclass(frozen=True)
class Compiled:
    variant: str
    arch: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    sweeps: tuple[Sweep, ...]

    def main_sweeps(self) -> dict[str, Sweep]:
        """The widest sweep of each kind: the unrolled loop and not its remainder."""
        return {s.kind: s for s in sorted(self.sweeps, key=lambda s: s.elements)}

    def broken_rules(self, num_warps: int) -> list[str]:
        """The rules that this binary breaks, in words."""
        widths = [width for s in self.sweeps for width in (s.load_bits, s.store_bits) if width]
        shared_row = VARIANTS[self.variant]["z"] != VARIANTS[self.variant]["dz"]
        programs = 65_536 // (self.registers * 32 * num_warps)
        shared = [s.kind for s in self.sweeps if shared_row and s.kind == "read+write"]
        synced = [s.kind for s in self.sweeps if s.barriers]
        checks = (
            self.spill_bytes == 0,
            min(widths, default=0) >= 128,
            all(s.ex2_per_element <= 1 for s in self.sweeps),
            programs >= (1 if num_warps == 32 else 2),
            synced == shared,
        )
        broken = [rule for rule, holds in zip(RULES, checks, strict=True) if not holds]
        return [f"{self.variant}, sm_{self.arch}: not {rule!r}" for rule in broken]


def compile_row_kernel(arch: int, z: str, dz: str, odd: bool = False, **flags: bool) -> bytes:
    """The cubin that the launcher's arguments lead to. The logits and their row stride are
    multiples of 16, as is V unless `odd`. Nothing is assumed of the per-token tensors."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, sizes = head._drgrpo_row_kernel, head.sizes_of(divmod(arch, 10))
    constants = FLAGS | flags | dict(SHARED_ROW=z != dz, BLOCK_V=sizes.block_v)
    pointers = dict(z_ptr=z, dz_ptr=dz, target_ptr="i64", clipped_ptr="i8")
    integers = ("V", "stride_z", "stride_dz", "stride_stat")

    def type_of(name):
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return f"*{pointers.get(name, 'fp32')}"
        return "i32" if name in integers else "fp32"

    index = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    multiples = ["z_ptr", "dz_ptr", "stride_z", "stride_dz"] + ([] if odd else ["V"])
    signature = {name: type_of(name) for name in kernel.arg_names}
    constexprs = {index[name]: value for name, value in constants.items()}
    attributes = {index[name]: [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    target, options = GPUTarget("cuda", arch, 32), {"num_warps": sizes.num_warps}
    return triton.compile(source, target=target, options=options).asm["cubin"]


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS) from the tools in Triton's wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        read = partial(subprocess.check_output, text=True, stderr=subprocess.PIPE)
        usage = read([tools / "cuobjdump", "--dump-resource-usage", file.name])
        return usage, read([tools / "nvdisasm", "-c", file.name])


def loops(sass: str) -> list[list[tuple[str, str]]]:
    """The instructions [(opcode, operands)] of every innermost loop: from the label of a backward
    branch to that branch."""
    code, labels, spans = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            code.append((match[1], match[2]))
    for i, (opcode, operands) in enumerate(code):
        target = re.search(r"\((\.L_x_\d+)\)", operands)
        if opcode.startswith("BRA") and target and labels.get(target[1], i + 1) <= i:
            spans.append((labels[target[1]], i + 1))

    def innermost(span):
        return not any(a != span and span[0] <= a[0] and a[1] <= span[1] for a in spans)

    return [code[start:end] for start, end in filter(innermost, spans)]


def bits(opcode: str) -> int:
    """Width of a global load or store: LDG.E.EL.128, STG.E.U16, LDG.E (32)."""
    if width := re.search(r"\.(64|128|256)\b", opcode):
        return int(width[1])
    if narrow := re.search(r"\.[US](8|16)\b", opcode):
        return int(narrow[1])
    return 32


def sweep_of(loop: list[tuple[str, str]], z_bits: int, dz_bits: int) -> Sweep | None:
    """The sweep that a loop is; None if it touches no global memory."""
    opcodes = [opcode for opcode, _ in loop]
    loads = [bits(opcode) for opcode in opcodes if opcode.startswith("LDG")]
    stores = [bits(opcode) for opcode in opcodes if opcode.startswith("STG")]
    if not loads and not stores:
        return None
    elements = sum(loads) // z_bits if loads else sum(stores) // dz_bits
    units = {}
    for unit, (pattern, _) in UNITS.items():
        units[unit] = sum(bool(re.match(pattern, opcode)) for opcode in opcodes) / elements
    return Sweep(
        kind="read+write" if loads and stores else "read" if loads else "write",
        elements=elements,
        instructions_per_element=len(loop) / elements,
        ex2_per_element=opcodes.count("MUFU.EX2") / elements,
        load_bits=min(loads, default=0),
        store_bits=min(stores, default=0),
        barriers=sum(opcode.startswith("BAR") for opcode in opcodes),
        units=units,
    )


def sweeps(sass: str, z_bits: int, dz_bits: int) -> tuple[Sweep, ...]:
    """The loops that touch global memory, whose elements have these widths."""
    return tuple(s for loop in loops(sass) if (s := sweep_of(loop, z_bits, dz_bits)))


def inspect(variant: str, arch: int) -> Compiled:
    """Compiles one variant and reads it."""
    options = VARIANTS[variant]
    usage, sass = disassemble(compile_row_kernel(arch, **options))
    registers, stack, shared = (
        int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "SHARED")
    )
    local = sum(bits(opcode) // 8 for opcode in re.findall(r"\b(?:LDL|STL)[\w.]*", sass))
    z_bits, dz_bits = (int(options[name].strip("bfp")) for name in ("z", "dz"))
    swept = sweeps(sass, z_bits, dz_bits)
    return Compiled(variant, arch, registers, stack + local, shared, swept)


# ---- bytes and memory, which are facts too

SHAPES = {"7B": (3584, 152_064), "1.5B": (1536, 151_936)}  # D, V of Qwen2.5
TOKENS = 16_384


def cost(T: int, D: int, V: int, chunk: int, logit_bytes: int = 2) -> dict[str, int]:
    """FLOPs, bytes and memory of loss and gradients, bf16 inputs. In the best case the second sweep
    reads from the L2 cache. dW is read, added to and written in fp32 per chunk, and cast at the
    end. dX is multiplied by the upstream scalar."""
    later_chunks = math.ceil(T / chunk) - 1
    return {
        "flops": 6 * T * V * D,
        "logits_bytes_best": T * V * (logit_bytes + 2),
        "logits_bytes_worst": T * V * (2 * logit_bytes + 2),
        "dweight_bytes": later_chunks * 8 * V * D + (4 + 2) * V * D,
        "dhidden_bytes": 4 * T * D,
        "peak_memory": max(chunk * V * logit_bytes + 4 * V * D, 6 * V * D) + 2 * T * D,
        "naive_memory": 2 * T * V * 3 + 2 * V * D + 2 * T * D,
    }


# ---- the prediction


@dataclass(frozen=True)
class Card:
    """SMs and L2 are from the data sheet. The rest is assumed: what large cuBLAS GEMMs and long
    copies reach, the clock under that load, and the latency of loaded memory."""

    name: str
    arch: int
    processors: int
    l2: float  # bytes
    flops: float  # bf16, per second; 82 and 80 % of the data sheet
    bandwidth: float  # bytes per second; 83 and 90 % of the data sheet
    clock: float  # Hz
    latency: float  # seconds


CARDS = (
    Card("A100", 80, 108, 40 * 2**20, 255e12, 1.7e12, 1.41e9, 640e-9),
    Card("H200", 90, 132, 50 * 2**20, 790e12, 4.3e12, 1.7e9, 750e-9),
)
SCENARIOS = ("low", "central", "high")
ASSUMED = {  # in each scenario
    # Share of the bytes beyond those of a bf16 GEMM that it does not hide. Tiles drift apart, so
    # that the last bytes of one tile move beside the products of another. No source: a range.
    "exposed": (0.1, 0.35, 1.0),
    # Share of the L2 cache that keeps rows for the second sweep. The gradient's writes take some.
    "l2": (1.0, 0.75, 0.5),
    # Latencies of a row that nothing hides. The kernel waits for the target, the target's logit,
    # the per-token inputs and the second sweep's first block.
    "waits": (2.0, 4.0, 8.0),
}
WIDE = (0.0, 0.5, 1.0)
"""0: cuBLAS has tiles of 128 x 128 that are as fast as those of 128 x 256, for products whose last
wave these would not fill. 1: it has not. The low and the high scenario take the best and the worst
case for the ratio."""
L2_LATENCY = 0.4  # of the memory's
K_STEP = 32  # of a GEMM: one column more costs as much


@dataclass(frozen=True)
class Configuration:
    """What the head computes, and the variant of the row kernel that does."""

    name: str
    variant: str
    logit_bytes: int = 2
    shifted: bool = False
    loss: bool = True


CONFIGURATIONS = (
    Configuration("loss, old_logprob, fp32 logits", "fp32 logits, bf16 gradient", 4),
    Configuration("loss, old_logprob, shifted", "off-policy, TIS, k3", shifted=True),
    Configuration("loss, on-policy, bf16 logits", "on-policy"),
    Configuration("log-prob, fp32 logits", "log-prob, fp32 logits", 4, loss=False),
    Configuration("log-prob, shifted", "log-prob", shifted=True, loss=False),
    Configuration("log-prob, bf16 logits", "log-prob", loss=False),
)


def gemm_seconds(card: Card, rows: int, columns: int, K: int, wide: float) -> float:
    """A product in whole waves of tiles, one tile on each SM. `wide` is one of WIDE."""

    def seconds(width: int) -> float:
        tiles = math.ceil(rows / 128) * math.ceil(columns / width)
        waves = math.ceil(tiles / card.processors)
        return waves * card.processors * 2 * 128 * width * K / card.flops

    best = min(seconds(128), seconds(256))
    return best + wide * (seconds(256) - best)


@dataclass(frozen=True)
class Case:
    """The head on a card, and what its time is made of, in seconds."""

    card: Card
    c: Configuration
    D: int
    V: int
    chunks: list[int]  # tokens of each
    sweeps: list[Sweep]

    def gemms(self, wide: float) -> float:
        """Z, and of a loss dX and dW."""
        D, V, K = self.D, self.V, self.D + K_STEP * self.c.shifted
        products = [(C, V, K) for C in self.chunks]
        if self.c.loss:
            products += [(C, D, V) for C in self.chunks] + [(V, D, C) for C in self.chunks]
        return sum(gemm_seconds(self.card, *product, wide) for product in products)

    def sweep(self, sweep: Sweep, moved: float, latency: float, waits: float) -> float:
        """The longest of memory traffic (`moved` bytes an element), the busiest unit, and latencies
        with one row on each SM. All loads of a turn are on their way at once. Then a warp issues
        the turn's instructions."""
        card, elements = self.card, sum(self.chunks) * self.V
        turns = math.ceil(self.V / (32 * head.NUM_WARPS * sweep.elements))
        issue = sweep.elements * sweep.instructions_per_element / card.clock
        rows = sum(math.ceil(chunk / card.processors) for chunk in self.chunks)
        return max(
            elements * moved / card.bandwidth,
            elements * sweep.clocks(card.arch) / (card.processors * card.clock),
            rows * (turns * (latency + issue) + waits * card.latency),
        )

    def row_pass(self, l2: float, waits: float) -> float:
        """One row is in flight on each SM. What of these rows fits the L2 cache is hit by the
        second sweep."""
        card, size = self.card, self.c.logit_bytes
        if not self.c.loss:
            return self.sweep(self.sweeps[0], size, card.latency, waits / 2)
        hit = min(l2 * card.l2 / (card.processors * self.V * size), 1.0)
        first = self.sweep(self.sweeps[0], size, card.latency, waits / 2)
        latency = card.latency * (1 - hit * (1 - L2_LATENCY))
        return first + self.sweep(self.sweeps[1], (1 - hit) * size + 2, latency, waits / 2)

    def parts(self, wide: float, exposed: float, l2: float, waits: float) -> dict[str, float]:
        """The head's time, by what takes it."""
        T, D, V, c = sum(self.chunks), self.D, self.V, self.c
        beyond = (c.logit_bytes - 2) * T * V
        other = 4 * V * D + 16 * T * D if c.shifted else 0  # the copy of W, the targets' logits
        if c.loss:
            beyond += (8 * (len(self.chunks) - 1) + 2) * V * D  # dW in fp32
            other += 6 * V * D + 4 * T * D  # the upstream scalar
        return {
            "GEMMs": self.gemms(wide),
            "exposed": exposed * beyond / self.card.bandwidth,
            "row pass": self.row_pass(l2, waits),
            "other": other / self.card.bandwidth,
        }

    def scenarios(self) -> dict[str, dict]:
        """By scenario: seconds, those of the bare GEMMs (bf16, all tokens at once), their ratio,
        and the parts."""
        bare, found = replace(self, c=replace(self.c, shifted=False), chunks=[sum(self.chunks)]), {}
        for i, scenario in enumerate(SCENARIOS):
            assumed, cases = {name: values[i] for name, values in ASSUMED.items()}, []
            for wide in WIDE:
                parts, floor = self.parts(wide, **assumed), bare.gemms(wide)
                total = sum(parts.values())
                cases.append(dict(ratio=total / floor, head=total, bare=floor, parts=parts))
            by_ratio = sorted(cases, key=itemgetter("ratio"))
            found[scenario] = cases[1] if scenario == "central" else by_ratio[i]
        return found


def predictions(compiled: list[Compiled]) -> list[dict]:
    """Of every configuration, model and card, with the counts of the card's architecture."""
    found = {(x.variant, x.arch): x.main_sweeps() for x in compiled}
    rows = []
    for c, (model, (D, V)), card in product(CONFIGURATIONS, SHAPES.items(), CARDS):
        if main := found.get((c.variant, card.arch)):
            sizes = head.sizes_of(divmod(card.arch, 10), card.processors)
            chunk = head.default_chunk_tokens(TOKENS, D, V, sizes)
            chunks = [min(chunk, TOKENS - start) for start in range(0, TOKENS, chunk)]
            sweeps = [main[kind] for kind in KINDS[: 1 + c.loss]]
            row = dict(configuration=c.name, model=model, card=card.name, chunks=chunks)
            rows.append(row | Case(card, c, D, V, chunks, sweeps).scenarios())
    return rows


# ---- the report

KINDS = ("read", "read+write", "write")
SWEEP_HEADS = ["variant", "arch", "regs", "spill", "smem", *KINDS]
PARTS = ("GEMMs", "exposed", "row pass", "other")
PREDICTION_HEADS = ["configuration", "head", "card", "chunks", "/ bare GEMMs: low", "central"]
PREDICTION_HEADS += ["high", "ms", "bare GEMMs", *PARTS]


def sweep_row(c: Compiled) -> list:
    main, cells = c.main_sweeps(), []
    for kind in KINDS:
        cells.append(main[kind].describe() if kind in main else "-")
    return [c.variant, f"sm_{c.arch}", c.registers, c.spill_bytes, c.shared_bytes, *cells]


def prediction_row(p: dict) -> list:
    names, chunks = [p["configuration"], p["model"], p["card"]], p["chunks"]
    ratios = [f"{p[scenario]['ratio']:.3f}" for scenario in SCENARIOS]
    central = p["central"]
    seconds = [central["head"], central["bare"], *(central["parts"][part] for part in PARTS)]
    return [*names, f"{len(chunks)} x {chunks[0]}", *ratios, *(1e3 * s for s in seconds)]


def report(arches: list[int]) -> dict:
    """Compiles every variant for every architecture, predicts, and prints tables of both."""
    compiled = [inspect(variant, arch) for variant, arch in product(VARIANTS, arches)]
    sizes = {arch: head.sizes_of(divmod(arch, 10)) for arch in arches}
    broken = [rule for c in compiled for rule in c.broken_rules(sizes[c.arch].num_warps)]
    predicted = predictions(compiled)
    costs = {model: cost(TOKENS, D, V, 8192) for model, (D, V) in SHAPES.items()}

    print("sweeps over the vocabulary: load/store bits, ex2 per element, instructions per element")
    print(markdown(SWEEP_HEADS, list(map(sweep_row, compiled))))
    print(f"\nprediction, T = {TOKENS}, bf16 inputs; ms and its parts are central")
    print(markdown(PREDICTION_HEADS, list(map(prediction_row, predicted))))
    for rule in broken:
        print("BROKEN", rule)
    used = {arch: s._asdict() for arch, s in sizes.items()}
    facts = {"sizes": used, "compiled": list(map(asdict, compiled))}
    assumed = {"cards": list(map(asdict, CARDS)), "assumed": ASSUMED | {"wide": WIDE}}
    return facts | assumed | {"cost": costs, "predictions": predicted, "broken": broken}


def run_without_interpreter() -> int:
    """Runs this command in a fresh process: TRITON_INTERPRET decides what @triton.jit is when
    triton is imported."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.static_report", *sys.argv[1:]]
    return subprocess.run(command, env=env).returncode


def main():
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--arch", type=int, nargs="+", default=[80, 90, 100], help="90 for sm_90")
    add("--json", type=Path, help="also write the report there")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit(run_without_interpreter())
    result = report(args.arch)
    text = json.dumps(result)
    if args.json:
        args.json.write_text(text + "\n")
    print(text)
    sys.exit(1 if result["broken"] else 0)


if __name__ == "__main__":
    main()
