"""A PTX interpreter. It runs on the CPU what Triton compiles for an NVIDIA GPU.

Triton's own interpreter executes the Python code of a kernel. This one executes the compiler's output, with inline
assembly. `interpreted` sends every Triton launch through it, and `run` executes the text of one kernel. All threads of
a launch execute one instruction at a time in lockstep. A register is a numpy array with one element per thread.

Modelled:
- The instructions of instructions.py and of Launch, bit for bit. Any other instruction is a Fault. ex2.approx and
  rcp.approx round to nearest, or have the largest error that the PTX ISA allows (`errors`).
- Global memory: the bytes of the argument tensors, and of the tensors whose addresses an int64 argument lists. An
  access outside of them is a Fault, and so are a misaligned access and two threads that write different values to one
  byte. A launch that faults does not change its tensors.
- Shared memory: each program has a separate one, which starts with random bits. The same checks hold between barriers.
- Registers: reading a register that was never written gives new random bits each time, as LLVM's undefined values may.
- Forward branches. All threads of a program must reach a barrier together, and all threads of a warp a shuffle.

Not modelled: time, caches, ptxas, loops, 2-D grids, and any thread order except lockstep. So the interpreter does not
notice a missing barrier between a write and another thread's read.
"""

import contextlib
import functools
import re
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import kernel_times
from ptx import instructions
from ptx.instructions import bits_dtype, decode, encode, width
from ptx.memory import Fault, Memory, regions_of

# ---------------------------------------------------------------------------------------------------------------------
# Programs


class Instruction(NamedTuple):
    text: str
    source: str  # file and line of the kernel, or "?" if the PTX does not say
    guard: str | None  # the predicate register that enables it
    negated: bool
    opcode: str
    operands: tuple[str, ...]


class Program(NamedTuple):
    name: str
    parameters: dict[str, int]  # name: its number
    instructions: list[Instruction]
    labels: dict[str, int]  # name: number of the instruction that follows it
    registers: dict[str, str]  # name, or prefix of numbered names: type


_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_ADDRESS = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+)\s*)?\]")


@functools.cache
def parse(ptx: str) -> Program:
    """The only kernel of a PTX module."""
    head, body = ptx[ptx.index(".entry") :].split("{", 1)
    names = re.findall(r"\.param .*?(\w+)\s*[,)\n]", head)
    parameters = {name: number for number, name in enumerate(names)}
    program, source = Program(re.search(r"\.entry (\w+)", head)[1], parameters, [], {}, {}), "?"
    for line in body.split("\t.section")[0].splitlines():
        if location := re.search(r"\.loc\b.*// (\S+:\d+):\d+", line):
            source = location[1]
        for statement in line.split("//")[0].split(";"):
            _parse_statement(program, statement.lstrip("{} \t").rstrip(), source)  # braces delimit inline assembly
    return program


def _parse_statement(program: Program, text: str, source: str) -> None:
    if declaration := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text):
        names = re.findall(r"%?\w+", re.sub(r"<\d+>", "", declaration[2]))
        program.registers.update(dict.fromkeys(names, declaration[1]))
    elif label := re.fullmatch(r"(\$\w+):", text):
        program.labels[label[1]] = len(program.instructions)
    elif text and not text.startswith("."):
        statement = _STATEMENT.fullmatch(text)
        if statement is None:
            raise Fault(f"{program.name}: cannot parse {text!r}")
        negated, guard, opcode, operands = statement.groups()
        operands = tuple(_OPERAND.findall(operands))
        program.instructions.append(Instruction(text, source, guard, negated == "!", opcode, operands))


def _vector(operand: str) -> list[str]:
    """The registers of "{%r1, %r2}" or of a single name."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


@functools.cache
def _immediate(text: str, kind: str) -> np.ndarray:
    bits = int(text[2:], 16) if text.startswith("0f") else int(text.rstrip("U"), 0)
    return np.array(bits != 0 if kind == "pred" else bits & (2 ** width(kind) - 1), bits_dtype(kind))


# ---------------------------------------------------------------------------------------------------------------------
# Launches


class Launch:
    """All threads of one launch. A mask says which threads execute an instruction; None means all threads."""

    def __init__(self, program, programs: int, threads: int, shared: int, numbers: list, memory: Memory, errors):
        self.program, self.numbers, self.memory, self.errors = program, numbers, memory, errors
        self.threads, self.n = threads, programs * threads
        self.random = np.random.default_rng(0)
        self.cta = np.repeat(np.arange(programs, dtype=np.uint32), threads)
        self.registers = {"%ctaid.x": self.cta, "%tid.x": np.tile(np.arange(threads, dtype=np.uint32), programs)}
        # The shared memory of program c begins at address c << 32. The program sees the low 32 bits of an address.
        contents = self.random.integers(0, 256, (programs, shared), np.uint8)
        self.shared = Memory([(cta << 32, content) for cta, content in enumerate(contents)])

    def run(self) -> None:
        active, waiting = None, {}  # waiting: number of an instruction -> the threads that branched to it
        for number, instruction in enumerate(self.program.instructions):
            if number in waiting:
                active = self.all_of(active) | waiting.pop(number)
                active = None if active.all() else active
            try:
                mask = self.guarded(instruction, active)
                if instruction.opcode == "ret" and mask is None:
                    return
                if instruction.opcode == "bra":
                    taken, target = self.all_of(mask), self.program.labels[instruction.operands[0]]
                    if target <= number:
                        raise Fault("a branch backwards; loops are not modelled")
                    waiting[target] = taken | waiting.get(target, False)
                    active = self.all_of(active) & ~taken
                else:
                    self.step(instruction, mask)
            except (Fault, instructions.Unknown) as error:
                raise Fault(f"{self.program.name}, {instruction.source}: `{instruction.text}`: {error}") from error

    def all_of(self, mask: np.ndarray | None) -> np.ndarray:
        return np.ones(self.n, bool) if mask is None else mask

    def guarded(self, instruction: Instruction, active: np.ndarray | None) -> np.ndarray | None:
        """The active threads for which the instruction's predicate holds."""
        if instruction.guard is None:
            return active
        mask = (self.read(instruction.guard, "pred") ^ instruction.negated) & self.all_of(active)
        return None if mask.all() else mask

    def step(self, instruction: Instruction, mask: np.ndarray | None) -> None:
        head, *modifiers = instruction.opcode.split(".")
        if head in _SPECIAL:
            _SPECIAL[head](self, modifiers, instruction.operands, mask)
        else:
            self.compute(instruction.opcode, instruction.operands, mask)

    # ---- registers ----

    def type_of(self, register: str) -> str:
        declared = self.program.registers
        if register not in declared:
            register = register.rstrip("0123456789")
        if register not in declared:
            raise Fault(f"{register} is not declared")
        return declared[register]

    def bits(self, register: str) -> np.ndarray:
        """The bits of a register, or new random bits if it was never written."""
        if register in self.registers:
            return self.registers[register]
        kind = self.type_of(register)
        return self.random.integers(0, 2 ** width(kind), self.n, bits_dtype(kind))

    def read(self, operand: str, kind: str) -> np.ndarray:
        """A register's values, or an immediate's single value, read as a type."""
        if operand == "global_smem":
            return np.array(0, bits_dtype(kind))
        if operand[0] in "-0123456789":
            return decode(_immediate(operand, kind), kind)
        bits = self.bits(operand)
        if bits.dtype.itemsize < bits_dtype(kind).itemsize:
            raise Fault(f"{operand} has fewer bits than .{kind}")
        return decode(bits.astype(bits_dtype(kind), copy=False), kind)

    def read_all(self, operand: str, kind: str) -> np.ndarray:
        """As `read`, but an immediate too has one element per thread."""
        return np.broadcast_to(self.read(operand, kind), self.n)

    def write(self, register: str, bits: np.ndarray, kind: str, mask: np.ndarray | None) -> None:
        """Write bits of a type. A wider register is extended with zeros, or with signs if the type is signed."""
        if register == "_":
            return
        dtype = bits_dtype(self.type_of(register))
        if bits.dtype.itemsize > dtype.itemsize:
            raise Fault(f"{register} has fewer bits than .{kind}")
        bits = decode(bits, kind).astype(dtype) if bits.dtype != dtype else bits
        self.registers[register] = np.broadcast_to(
            bits if mask is None else np.where(mask, bits, self.bits(register)), self.n
        )

    # ---- arithmetic ----

    def compute(self, opcode: str, operands: tuple[str, ...], mask: np.ndarray | None) -> None:
        operation = instructions.find(opcode)
        targets = operands[0].split("|")  # a comparison of packed halves has two
        if len(operands) != 1 + len(operation.operands):
            raise Fault(f"{len(operands) - 1} operands, need {len(operation.operands)}")
        values = [self.read(name, kind) for name, kind in zip(operands[1:], operation.operands, strict=True)]
        result = operation.function(*values)
        if opcode in instructions.APPROXIMATE_ULPS and self.errors:
            result = instructions.nudge(result, self.ulps(instructions.APPROXIMATE_ULPS[opcode]))
        bits = encode(result, operation.result)
        for target, part in zip(targets, bits if len(targets) == 2 else [bits], strict=True):
            self.write(target, part, operation.result, mask)

    def ulps(self, most: int) -> np.ndarray:
        if self.errors == "random":
            return self.random.integers(-most, most, self.n, endpoint=True)
        return np.array({"low": -most, "high": most}[self.errors])

    def move(self, modifiers: list[str], operands: tuple[str, ...], mask: np.ndarray | None) -> None:
        """mov: copy a register, pack registers into a wider one, or unpack one. The first part has the lowest bits."""
        (kind,), (target, source) = modifiers, operands
        kind = kind if kind == "pred" else f"b{width(kind)}"
        targets, sources = _vector(target), _vector(source)
        part = kind if len(targets) == len(sources) else f"b{width(kind) // max(len(targets), len(sources))}"
        if len(sources) > 1:
            bits = np.zeros(self.n, bits_dtype(kind))
            for i, name in enumerate(sources):
                bits |= self.read(name, part).astype(bits.dtype) << bits.dtype.type(i * width(part))
            self.write(target, bits, kind, mask)
        elif len(targets) > 1:
            bits = self.read(source, kind)
            for i, name in enumerate(targets):
                self.write(name, (bits >> bits.dtype.type(i * width(part))).astype(bits_dtype(part)), part, mask)
        else:
            self.write(target, self.read(source, kind), kind, mask)

    # ---- memory ----

    def address(self, operand: str, space: str) -> np.ndarray:
        base, offset = _ADDRESS.fullmatch(operand).groups(default="0")
        kind = "b64" if space == "global" else "b32"
        address = np.broadcast_to(self.read(base, kind) + _immediate(offset, kind), self.n).astype(np.uint64)
        return address if space == "global" else address | self.cta.astype(np.uint64) << np.uint64(32)

    def access(self, modifiers: list[str]) -> tuple[str, Memory, int, str]:
        """Name of the address space, its memory, the number of elements, their type."""
        form = re.fullmatch(r"(global|shared)\.(?:v([24])\.)?(\w+)", ".".join(modifiers))
        if form is None:
            raise Fault("only ld and st of .global and .shared memory, with no other modifiers, are modelled")
        space, count, kind = form.groups(default="1")
        return space, self.memory if space == "global" else self.shared, int(count), kind

    def load(self, modifiers: list[str], operands: tuple[str, ...], mask: np.ndarray | None) -> None:
        if modifiers[0] == "param":
            self.load_parameter(modifiers[1], *operands, mask)
            return
        space, memory, count, kind = self.access(modifiers)
        threads = np.flatnonzero(self.all_of(mask))
        address = self.address(operands[1], space)[threads]
        loaded = memory.load(address, bits_dtype(kind), count, threads)
        for name, values in zip(_vector(operands[0]), loaded, strict=True):
            self.write(name, self.spread(values, threads), kind, mask)

    def spread(self, values: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """An array over all threads with these values at `threads` and zeros elsewhere."""
        result = np.zeros(self.n, values.dtype)
        result[threads] = values
        return result

    def load_parameter(self, kind: str, register: str, parameter: str, mask: np.ndarray | None) -> None:
        number = self.numbers[self.program.parameters[parameter.strip("[] ")]]
        bits = int(np.float32(number).view(np.uint32)) if isinstance(number, float) else int(number)
        self.write(register, np.array(bits & (2 ** width(kind) - 1), bits_dtype(kind)), kind, mask)

    def store(self, modifiers: list[str], operands: tuple[str, ...], mask: np.ndarray | None) -> None:
        space, memory, _, kind = self.access(modifiers)
        threads = np.flatnonzero(self.all_of(mask))
        elements = [self.read_all(name, f"b{width(kind)}")[threads] for name in _vector(operands[1])]
        memory.store(self.address(operands[0], space)[threads], elements, threads)

    # ---- communication between threads ----

    def together(self, mask: np.ndarray | None, size: int) -> None:
        """Raise Fault unless in each group of `size` threads either all or none execute the instruction."""
        groups = self.all_of(mask).reshape(-1, size)
        if (groups.any(1) != groups.all(1)).any():
            raise Fault(f"only some of {size} threads execute it, but they must do so together")

    def barrier(self, modifiers: list[str], operands: tuple[str, ...], mask: np.ndarray | None) -> None:
        if (modifiers, operands) != (["sync"], ("0",)):
            raise Fault("only bar.sync 0 is modelled")
        self.together(mask, self.threads)
        self.shared.barrier()

    def shuffle(self, modifiers: list[str], operands: tuple[str, ...], mask: np.ndarray | None) -> None:
        """shfl.sync.bfly: read the value of the thread with number (this thread's) XOR `lanes`."""
        register, source, lanes, clamp, members = operands
        self.together(mask, 32)
        if modifiers != ["sync", "bfly", "b32"] or clamp != "31" or (self.read(members, "b32") != 0xFFFFFFFF).any():
            raise Fault("only shfl.sync.bfly.b32 of all 32 threads with clamp 31 is modelled")
        values = self.read_all(source, "b32")
        self.write(register, values[np.arange(self.n) ^ int(lanes)], "b32", mask)

    def matrix_elements(self, modifiers: list[str], operand: str, mask: np.ndarray | None) -> list[list[np.ndarray]]:
        """For ldmatrix and stmatrix: the addresses of a thread's two elements in each 8x8 matrix of 16-bit elements.

        Thread 8 i + r of a warp has the address of row r of matrix i (16 bytes). Thread t holds the elements
        (t / 4, 2 (t % 4)) and (t / 4, 2 (t % 4) + 1) of a matrix, or with .trans of the transposed matrix.
        """
        if modifiers[:3] != ["sync", "aligned", "m8n8"] or modifiers[-2:] != ["shared", "b16"]:
            raise Fault("only ldmatrix and stmatrix .sync.aligned.m8n8.shared.b16 are modelled")
        self.together(mask, 32)
        rows, thread = self.address(operand, "shared"), np.arange(self.n)
        warp, lane = thread // 32 * 32, thread % 32
        count = int(modifiers[3].removeprefix("x"))
        addressing = np.flatnonzero(self.all_of(mask) & (lane < 8 * count))
        self.shared.offset(rows[addressing], 16, addressing)  # checks the rows
        places = [(lane // 4, 2 * (lane % 4) + half) for half in range(2)]
        if "trans" in modifiers:
            places = [(column, row) for row, column in places]
        return [
            [rows[warp + 8 * i + row] + (2 * column).astype(np.uint64) for row, column in places] for i in range(count)
        ]

    def load_matrices(self, modifiers: list[str], operands: tuple[str, ...], mask: np.ndarray | None) -> None:
        threads = np.flatnonzero(self.all_of(mask))
        matrices = self.matrix_elements(modifiers, operands[1], mask)
        for name, halves in zip(_vector(operands[0]), matrices, strict=True):
            low, high = (self.shared.load(half[threads], np.dtype(np.uint16), 1, threads)[0] for half in halves)
            word = low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
            self.write(name, self.spread(word, threads), "b32", mask)

    def store_matrices(self, modifiers: list[str], operands: tuple[str, ...], mask: np.ndarray | None) -> None:
        threads = np.flatnonzero(self.all_of(mask))
        matrices = self.matrix_elements(modifiers, operands[0], mask)
        for name, halves in zip(_vector(operands[1]), matrices, strict=True):
            word = self.read_all(name, "b32")[threads]
            for i, half in enumerate(halves):
                self.shared.store(half[threads], [(word >> np.uint32(16 * i)).astype(np.uint16)], threads)


_SPECIAL = {
    "mov": Launch.move,
    "ld": Launch.load,
    "st": Launch.store,
    "bar": Launch.barrier,
    "shfl": Launch.shuffle,
    "ldmatrix": Launch.load_matrices,
    "stmatrix": Launch.store_matrices,
}


def run(ptx: str, programs: int, threads: int, shared: int, arguments: list, errors: str | None = None) -> None:
    """Launch a kernel: `programs` programs of `threads` threads and `shared` bytes of shared memory each.

    arguments: tensors or numbers, in the order of the kernel's parameters. errors: None rounds ex2.approx and
    rcp.approx to nearest; "low", "high" and "random" give them the largest error that is allowed, below, above or
    either. Raises Fault, which names the instruction, if a GPU would refuse the launch or the interpreter lacks it.
    """
    program = parse(ptx)
    if len(arguments) != len(program.parameters) or errors not in (None, "low", "high", "random"):
        raise ValueError(f"run: {len(arguments)} arguments, errors {errors!r}; {program.name} has {program.parameters}")
    regions = regions_of([argument for argument in arguments if torch.is_tensor(argument)])
    numbers = [argument.data_ptr() if torch.is_tensor(argument) else argument for argument in arguments]
    memory = Memory(regions)
    with np.errstate(all="ignore"):
        Launch(program, programs, threads, shared, numbers, memory, errors).run()
    for start, content in regions:
        content[:] = memory.contents(start)


@contextlib.contextmanager
def interpreted(arch: int, errors: str | None = None):
    """A context in which Triton compiles every kernel for sm_`arch` and `run` executes it on CPU tensors."""

    def launch(compiled, grid, arguments):
        (programs,) = grid
        passed = [arguments[name] for name, kind in compiled.src.signature.items() if kind != "constexpr"]
        scratch = [0, 0]  # Triton's scratch pointers, which these kernels do not use
        metadata = compiled.metadata
        run(compiled.asm["ptx"], programs, 32 * metadata.num_warps, metadata.shared, [*passed, *scratch], errors)

    with kernel_times.redirected(arch, launch):
        yield
