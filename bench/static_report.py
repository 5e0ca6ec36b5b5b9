"""Facts about the row kernel without a GPU, read from machine code for sm_80, sm_90 and sm_100.

    python -m bench.static_report [--arch 80 90 100] [--json PATH]

Per variant and architecture: registers, spilled bytes, shared memory, the narrowest global load and
store of the sweeps over the vocabulary, ex2 instructions and all instructions per element. Then
bytes and FLOPs of the whole head against the minimum, and a prediction of its time. The counts are
facts. The predictions assume the rates in DEVICES, which are not measured here. The exit status is
1 if a rule of RULES is broken. The last line is JSON.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product, starmap
from pathlib import Path

from bench.harness import command_line, markdown

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

    from drgrpo.kernels import linear_drgrpo as head

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
    return Sweep(
        kind="read+write" if loads and stores else "read" if loads else "write",
        elements=elements,
        instructions_per_element=len(loop) / elements,
        ex2_per_element=opcodes.count("MUFU.EX2") / elements,
        load_bits=min(loads, default=0),
        store_bits=min(stores, default=0),
        barriers=sum(opcode.startswith("BAR") for opcode in opcodes),
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


# ---- bytes, FLOPs, predictions


@dataclass(frozen=True)
class Device:
    """Assumed, not measured: what large cuBLAS GEMMs and long copies reach, and the clock under
    that load."""

    name: str
    flops: float  # bf16, per second
    bandwidth: float  # bytes per second
    lanes: int  # fp32 lanes: SMs * 128
    clock: float


DEVICES = (
    Device("A100", 255e12, 1.7e12, 108 * 128, 1.41e9),
    Device("H200", 790e12, 4.3e12, 132 * 128, 1.7e9),
)
SHAPES = {"7B": (3584, 152_064), "1.5B": (1536, 151_936)}


def cost(T: int, D: int, V: int, chunk: int, logit_bytes: int = 2) -> dict[str, int]:
    """FLOPs, bytes and memory of loss and gradients, bf16 inputs. The minimum reads inputs once and
    writes gradients once. In the best case the second sweep reads from the L2 cache. dW is read,
    added to and written in fp32 per chunk, and cast at the end. dX is multiplied by the upstream
    scalar."""
    later_chunks = math.ceil(T / chunk) - 1
    return {
        "flops": 6 * T * V * D,
        "minimum_bytes": 2 * (T * D + V * D) * 2,
        "logits_bytes_best": T * V * (logit_bytes + 2),
        "logits_bytes_worst": T * V * (2 * logit_bytes + 2),
        "dweight_bytes": later_chunks * 8 * V * D + (4 + 2) * V * D,
        "dhidden_bytes": 4 * T * D,
        "peak_memory": max(chunk * V * logit_bytes + 4 * V * D, 6 * V * D) + 2 * T * D,
        "naive_memory": 2 * T * V * 3 + 2 * V * D + 2 * T * D,
    }


def predict(
    device: Device, T: int, D: int, V: int, chunk: int, instructions: tuple[float, float]
) -> dict:
    """Milliseconds of loss and gradients, and of log-probs alone, with bf16 logits unless named.
    `instructions` per element: (first sweep, second). A sweep takes the longer of its memory and
    its instructions."""
    c = cost(T, D, V, chunk)
    gemm = 2 * T * V * D / device.flops
    first, second = (n * T * V / (device.lanes * device.clock) for n in instructions)
    memory = {n: n * T * V / device.bandwidth for n in (2, 4)}  # n bytes a logit
    cached = c["logits_bytes_best"] / device.bandwidth
    other = (c["dweight_bytes"] + c["dhidden_bytes"]) / device.bandwidth
    best = max(cached, first + second) + other
    worst = max(memory[2], first) + max(memory[4], second) + other
    fp32_read = max(memory[4], first) + memory[2]  # the GEMM writes 2 bytes more, too
    return {
        **dict(device=device.name, T=T, D=D, V=V, chunk=chunk),
        "three_gemms_ms": 3e3 * gemm,
        "best_ms": 1e3 * (3 * gemm + best),
        "worst_ms": 1e3 * (3 * gemm + worst),
        "best_ratio": 1 + best / (3 * gemm),
        "worst_ratio": 1 + worst / (3 * gemm),
        "logprob_bf16_ratio": 1 + max(memory[2], first) / gemm,
        "logprob_fp32_ratio": 1 + fp32_read / gemm,
        "row_kernel_issue_share": (first + second) / cached,
    }


# ---- the report

KINDS = ("read", "read+write", "write")
SWEEP_HEADS = ["variant", "arch", "regs", "spill", "smem", *KINDS]
COSTS = {  # heading: key of `cost`
    "logits GB, best": "logits_bytes_best",
    "worst": "logits_bytes_worst",
    "dW GB": "dweight_bytes",
    "in and out GB, minimum": "minimum_bytes",
    "memory GB": "peak_memory",
    "naive": "naive_memory",
}
PREDICTION_HEADS = ["head", "device", "3 GEMMs ms", "fused ms", "/ 3 GEMMs"]
PREDICTION_HEADS += ["log-prob / GEMM", "fp32 logits", "instructions / memory time"]


def sweep_row(c: Compiled) -> list:
    main, cells = c.main_sweeps(), []
    for kind in KINDS:
        cells.append(main[kind].describe() if kind in main else "-")
    return [c.variant, f"sm_{c.arch}", c.registers, c.spill_bytes, c.shared_bytes, *cells]


def cost_row(model: str, c: dict[str, int]) -> list[str]:
    return [model, f"{c['flops'] / 1e12:.1f}", *(f"{c[key] / 1e9:.2f}" for key in COSTS.values())]


def prediction_row(p: dict) -> list[str]:
    fused = f"{p['best_ms']:.0f} to {p['worst_ms']:.0f}"
    ratio = f"{p['best_ratio']:.2f} to {p['worst_ratio']:.2f}"
    logprob = [f"{p[f'logprob_{dtype}_ratio']:.2f}" for dtype in ("bf16", "fp32")]
    share = f"{p['row_kernel_issue_share']:.0%}"
    return [p["model"], p["device"], f"{p['three_gemms_ms']:.0f}", fused, ratio, *logprob, share]


def report(arches: list[int]) -> dict:
    """Compiles every variant for every architecture, predicts, and prints tables of both."""
    from drgrpo.kernels import linear_drgrpo as head

    compiled = [inspect(variant, arch) for variant, arch in product(VARIANTS, arches)]
    sizes = {arch: head.sizes_of(divmod(arch, 10)) for arch in arches}
    broken = [rule for c in compiled for rule in c.broken_rules(sizes[c.arch].num_warps)]
    main = compiled[0].main_sweeps()
    instructions = tuple(main[kind].instructions_per_element for kind in ("read", "read+write"))
    T, chunk = 16_384, 4096
    costs = {model: cost(T, D, V, chunk) for model, (D, V) in SHAPES.items()}
    predictions = []
    for (model, (D, V)), device in product(SHAPES.items(), DEVICES):
        predictions.append({"model": model} | predict(device, T, D, V, chunk, instructions))

    print("sweeps over the vocabulary: load/store bits, ex2 per element, instructions per element")
    print(markdown(SWEEP_HEADS, list(map(sweep_row, compiled))))
    print(f"\nloss and gradients, bf16, T = {T}, chunks of {chunk} tokens: cost and prediction")
    print(markdown(["head", "TFLOP", *COSTS], list(starmap(cost_row, costs.items()))), end="\n\n")
    print(markdown(PREDICTION_HEADS, list(map(prediction_row, predictions))))
    for rule in broken:
        print("BROKEN", rule)
    used = {arch: s._asdict() for arch, s in sizes.items()}
    facts = {"sizes": used, "compiled": list(map(asdict, compiled))}
    return facts | {"cost": costs, "predictions": predictions, "broken": broken}


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
