"""What can be said about the row kernel without a GPU: compiled for sm_80, sm_90 and sm_100, read
from the machine code.

    python -m bench.static_report [--arch 80 90 100] [--json PATH]

Per variant and architecture: registers, spilled bytes, shared memory, the narrowest global load and
store of the sweeps over the vocabulary, ex2 instructions and all instructions per element. Then
bytes and FLOPs of the whole head against the minimum, and a prediction of its time. The predictions
assume the rates in DEVICES, which are not measured here; the counts are facts. Exit status 1 if a
rule of RULES is broken; the last line is JSON.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

RULES = (
    "no spills, no stack",
    "every load and store of a sweep is 128 bits wide or wider",
    "at most one ex2 per element and sweep",
    "two programs fit an SM's registers, or one of 32 warps",
    "a barrier between load and store exactly where they touch each other's elements",
)

BF16 = dict(z="bf16", dz="bf16")
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
    """One loop over the vocabulary, in SASS. `elements` are those of one thread in one turn."""

    kind: str  # "read", "read+write", "write"
    elements: int
    instructions_per_element: float
    ex2_per_element: float
    load_bits: int  # narrowest; 0: none
    store_bits: int
    barriers: int


@dataclass(frozen=True)
class Compiled:
    variant: str
    arch: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    sweeps: tuple[Sweep, ...]

    def broken_rules(self, num_warps):
        """The rules that this binary breaks, in words."""
        widths = [w for s in self.sweeps for w in (s.load_bits, s.store_bits) if w]
        shared_row = VARIANTS[self.variant]["z"] != VARIANTS[self.variant]["dz"]
        programs = 65_536 // (self.registers * 32 * num_warps)
        checks = (
            self.spill_bytes == 0,
            bool(widths) and min(widths) >= 128,
            all(s.ex2_per_element <= 1 for s in self.sweeps),
            programs >= (1 if num_warps == 32 else 2),
            all((s.barriers > 0) == (shared_row and s.kind == "read+write") for s in self.sweeps),
        )
        return [
            f"{self.variant}, sm_{self.arch}: not {rule!r}"
            for rule, ok in zip(RULES, checks, strict=True)
            if not ok
        ]


def compile_row_kernel(
    arch, z, dz, LOSS=True, GRAD=True, HAS_OLD=False, HAS_SAMPLER=False, HAS_REF=False, odd=False
):
    """The cubin that the launcher's arguments lead to: the logits and their row stride are
    multiples of 16, as is V unless `odd`; nothing is assumed of the per-token tensors."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from drgrpo.kernels import linear_drgrpo as head

    kernel = head._drgrpo_row_kernel
    constants = dict(
        LOSS=LOSS, GRAD=GRAD, HAS_OLD=HAS_OLD, HAS_SAMPLER=HAS_SAMPLER, HAS_REF=HAS_REF, SHARED_ROW=z != dz
    )
    sizes = head.sizes_of(divmod(arch, 10))
    constants |= dict(BLOCK_V=sizes.block_v)
    pointers = dict(z_ptr=z, dz_ptr=dz, target_ptr="i64", clipped_ptr="i8")
    integers = ("V", "stride_z", "stride_dz", "stride_stat")
    multiples = {"z_ptr", "dz_ptr", "stride_z", "stride_dz", "V"} - ({"V"} if odd else set())
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        pointer = name.endswith("_ptr")
        signature[name] = (
            "constexpr"
            if name in constants
            else f"*{pointers.get(name, 'fp32')}"
            if pointer
            else "i32"
            if name in integers
            else "fp32"
        )
        if name in multiples:
            aligned[(i,)] = [["tt.divisibility", 16]]
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": sizes.num_warps}
    ).asm["cubin"]


def disassemble(cubin):
    """(resource usage, SASS) from the tools in Triton's wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = (
            [tools / "cuobjdump", "--dump-resource-usage", file.name],
            [tools / "nvdisasm", "-c", file.name],
        )
        return [
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for command in commands
        ]


def loops(sass):
    """The instructions [(opcode, operands)] of every innermost loop: from the label of a backward
    branch to that branch."""
    code, labels, found = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            code.append((match[1], match[2]))
    for i, (opcode, operands) in enumerate(code):
        target = re.search(r"\((\.L_x_\d+)\)", operands)
        if opcode.startswith("BRA") and target and labels.get(target[1], i + 1) <= i:
            found.append((labels[target[1]], i + 1))
    inner = [a for a in found if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    return [code[start:end] for start, end in inner]


def bits(opcode):
    """Width of a global load or store: LDG.E.EL.128, STG.E.U16, LDG.E (32)."""
    if width := re.search(r"\.(64|128|256)\b", opcode):
        return int(width[1])
    return 8 if re.search(r"\.[US]8\b", opcode) else 16 if re.search(r"\.[US]16\b", opcode) else 32


def sweeps(sass, element_bits):
    """The loops that touch global memory. Widths are in bits of the logits' type, `element_bits` =
    (z, dz)."""
    found = []
    for loop in loops(sass):
        loads = [bits(op) for op, _ in loop if op.startswith("LDG")]
        stores = [bits(op) for op, _ in loop if op.startswith("STG")]
        if not loads and not stores:
            continue
        elements = sum(loads) // element_bits[0] if loads else sum(stores) // element_bits[1]
        counts = Counter(op for op, _ in loop)
        kind = "read+write" if loads and stores else "read" if loads else "write"
        per_element = [len(loop) / elements, counts["MUFU.EX2"] / elements]
        barriers = sum(op.startswith("BAR") for op, _ in loop)
        found.append(
            Sweep(
                kind,
                elements,
                *per_element,
                min(loads, default=0),
                min(stores, default=0),
                barriers,
            )
        )
    return tuple(found)


def inspect(variant, arch):
    """Compiles one variant and reads it."""
    options = VARIANTS[variant]
    usage, sass = disassemble(compile_row_kernel(arch, **options))
    registers, stack, shared = (
        int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "SHARED")
    )
    local = sum(bits(op) // 8 for op in re.findall(r"\b(?:LDL|STL)[\w.]*", sass))
    size = {"bf16": 16, "fp16": 16, "fp32": 32}
    return Compiled(
        variant,
        arch,
        registers,
        stack + local,
        shared,
        sweeps(sass, (size[options["z"]], size[options["dz"]])),
    )


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


def cost(T, D, V, chunk, logit_bytes=2):
    """FLOPs, bytes and memory of loss and gradients, bf16 inputs. `minimum`: inputs read once,
    gradients written once."""
    chunks = math.ceil(T / chunk)
    return {
        "flops": 6 * T * V * D,
        "minimum_bytes": 2 * (T * D + V * D) * 2,
        "logits_bytes_best": T * V * (logit_bytes + 2),  # the second sweep reads from the L2 cache
        "logits_bytes_worst": T * V * (2 * logit_bytes + 2),
        "dweight_bytes": (chunks - 1) * 8 * V * D
        + (4 + 2) * V * D,  # fp32 read-modify-write per chunk, cast at the end
        "dhidden_bytes": 4 * T * D,  # times the upstream scalar
        "peak_memory": max(chunk * V * logit_bytes + 4 * V * D, 6 * V * D) + 2 * T * D,
        "naive_memory": 2 * T * V * 3 + 2 * V * D + 2 * T * D,
    }


def predict(device, T, D, V, chunk, instructions):
    """Milliseconds of loss and gradients, and of log-probs alone. `instructions` per element:
    (first sweep, second)."""
    c = cost(T, D, V, chunk)
    gemm = 2 * T * V * D / device.flops
    issue = T * V / (device.lanes * device.clock)  # seconds for one instruction per element
    other = (c["dweight_bytes"] + c["dhidden_bytes"]) / device.bandwidth
    first, second = instructions
    best = max(c["logits_bytes_best"] / device.bandwidth, issue * (first + second))
    worst = max(2 * T * V / device.bandwidth, issue * first) + max(
        4 * T * V / device.bandwidth, issue * second
    )
    read = {bytes_: max(bytes_ * T * V / device.bandwidth, issue * first) for bytes_ in (2, 4)}
    return {
        "device": device.name,
        "T": T,
        "D": D,
        "V": V,
        "chunk": chunk,
        "three_gemms_ms": 3e3 * gemm,
        "best_ms": 1e3 * (3 * gemm + best + other),
        "worst_ms": 1e3 * (3 * gemm + worst + other),
        "best_ratio": 1 + (best + other) / (3 * gemm),
        "worst_ratio": 1 + (worst + other) / (3 * gemm),
        "logprob_bf16_ratio": 1 + read[2] / gemm,
        "logprob_fp32_ratio": 1
        + (read[4] + 2 * T * V / device.bandwidth) / gemm,  # and 2 more bytes written by the GEMM
        "row_kernel_issue_share": issue
        * (first + second)
        / (c["logits_bytes_best"] / device.bandwidth),
    }


# ---- the report


def table(compiled):
    print("sweeps over the vocabulary: load/store bits, ex2 per element, instructions per element")
    print(f"{'variant':28} {'arch':6} {'regs':>4} {'spill':>5} {'smem':>5}")
    for c in compiled:
        main = {
            s.kind: s for s in sorted(c.sweeps, key=lambda s: s.elements)
        }  # the unrolled loop, not its remainder
        columns = [
            f"{s.kind} {s.load_bits}/{s.store_bits}, {s.ex2_per_element:g}, {s.instructions_per_element:.1f}"
            for s in main.values()
        ]
        text = "   ".join(columns)
        print(
            f"{c.variant:28} sm_{c.arch:<3} {c.registers:4} {c.spill_bytes:5} {c.shared_bytes:5}   {text}"
        )


def report(arches):
    from drgrpo.kernels import linear_drgrpo as head

    compiled = [inspect(variant, arch) for variant in VARIANTS for arch in arches]
    table(compiled)
    sizes = {arch: head.sizes_of(divmod(arch, 10)) for arch in arches}
    broken = [rule for c in compiled for rule in c.broken_rules(sizes[c.arch].num_warps)]
    main = {s.kind: s for s in sorted(compiled[0].sweeps, key=lambda s: s.elements)}
    instructions = [main[kind].instructions_per_element for kind in ("read", "read+write")]
    T, predictions, costs = 16_384, [], {}
    print(
        "\nloss and gradients, bf16, T = 16384, 4096-token chunks: prediction against three bare GEMMs"
    )
    for name, (D, V) in SHAPES.items():
        costs[name] = c = cost(T, D, V, 4096)
        print(
            f"{name:5} {c['flops'] / 1e12:.1f} TFLOP; logits {c['logits_bytes_best'] / 1e9:.1f} to "
            f"{c['logits_bytes_worst'] / 1e9:.1f} GB, dW {c['dweight_bytes'] / 1e9:.1f} GB, inputs and gradients at least "
            f"{c['minimum_bytes'] / 1e9:.1f} GB; memory {c['peak_memory'] / 1e9:.2f} GB (naive {c['naive_memory'] / 1e9:.1f})"
        )
        for device in DEVICES:
            p = predict(device, T, D, V, 4096, instructions)
            predictions.append({"model": name} | p)
            print(
                f"      {device.name}: {p['best_ms']:.0f} to {p['worst_ms']:.0f} ms = {p['best_ratio']:.2f} to "
                f"{p['worst_ratio']:.2f} of {p['three_gemms_ms']:.0f} ms; log-prob alone {p['logprob_bf16_ratio']:.2f} of one "
                f"GEMM (fp32 logits {p['logprob_fp32_ratio']:.2f}); instructions take {p['row_kernel_issue_share']:.0%} of the "
                "row kernel's memory time"
            )
    for rule in broken:
        print("BROKEN", rule)
    return {
        "sizes": {arch: s._asdict() for arch, s in sizes.items()},
        "compiled": [asdict(c) for c in compiled],
        "cost": costs,
        "predictions": predictions,
        "broken": broken,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        default=[80, 90, 100],
        help="compute capabilities, 90 for sm_90",
    )
    parser.add_argument("--json", type=Path, help="also write the report there")
    args = parser.parse_args()
    if (
        os.environ.get("TRITON_INTERPRET", "0") != "0"
    ):  # decides what @triton.jit is at import, so a fresh process it is
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        sys.exit(
            subprocess.run(
                [sys.executable, "-m", "bench.static_report", *sys.argv[1:]], env=env
            ).returncode
        )
    result = report(args.arch)
    text = json.dumps(result)
    if args.json:
        args.json.write_text(text + "\n")
    print(text)
    sys.exit(1 if result["broken"] else 0)


if __name__ == "__main__":
    main()
