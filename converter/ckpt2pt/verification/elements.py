"""Elements of two tensors compared block by block; and rounding, by other arithmetic than the writer's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckpt2pt.verification.gather import Bytes, Elements, Files, spans, width


@dataclass(slots=True)
class Differing:
    """The elements that differ between tensors of types ``left`` and ``right``.

    ``bits_only`` counts those of equal value, 0.0 against -0.0, and ``differing`` all others.  A NaN equals any NaN, unless
    ``strict``: then every bit counts, and ``differing`` counts them all.  ``index`` is the first of either, ``shown`` what
    both sides hold there.
    """

    left: str
    right: str
    strict: bool = False
    seen: int = 0
    differing: int = 0
    bits_only: int = 0
    max_abs: float | None = None
    index: int | None = None
    shown: tuple[str, str] = ("", "")

    @property
    def count(self) -> int:
        """Elements whose bits tell them apart."""
        return self.differing + self.bits_only

    def compare(self, files: Files, one: Elements, other: Elements, numel: int) -> Differing:
        """Read ``numel`` elements of both sides, and count what differs."""
        for start, stop in spans(numel, max(width(self.left), width(self.right))):
            self.see(start, one.block(files, start, stop), other.block(files, start, stop))
        return self

    def see(self, start: int, one: Bytes, other: Bytes) -> None:
        """Compare a block, whose first element is number ``start``."""
        self.seen += len(one) // width(self.left)
        if self.left == self.right and _same_bytes(one, other):
            return
        x, y = values(one, self.left), values(other, self.right)
        exact = self.strict or (self.left == self.right and "float" not in self.left)
        unlike = (
            _unlike_bits(one, other, self.left)
            if self.left == self.right
            else np.ones(len(one) // width(self.left), np.bool_)
        )
        sign_only = np.zeros_like(unlike)
        if x is not None and y is not None and not exact:
            # Equal values of unlike bits are 0.0 and -0.0; a NaN has many forms, and none of them says anything.
            sign_only = unlike & (x == y) & (self.left == self.right)
            unlike &= (x != y) & ~(np.isnan(x) & np.isnan(y))
        self.differing += int(unlike.sum())
        self.bits_only += int(sign_only.sum())
        either = unlike | sign_only
        if self.index is None and either.any():
            first = int(either.argmax())
            self.index = start + first
            self.shown = (show_element(one, self.left, first), show_element(other, self.right, first))
        if x is not None and y is not None and unlike.any():
            with np.errstate(invalid="ignore", over="ignore"):
                far = np.abs(x - y)[unlike]
            # maximum, unlike max, lets a NaN win: a NaN against a number is as far as can be.
            self.max_abs = float(np.maximum(far.max(), self.max_abs or 0.0))


def _same_bytes(one: Bytes, other: Bytes) -> bool:
    words = one.size // 8 * 8
    return np.array_equal(one[:words].view(np.uint64), other[:words].view(np.uint64)) and np.array_equal(
        one[words:], other[words:]
    )


def _unlike_bits(one: Bytes, other: Bytes, dtype: str) -> npt.NDArray[np.bool_]:
    # Whole words, and for complex128 both of them.
    unlike = (bits(one, dtype) != bits(other, dtype)).reshape(-1, max(1, width(dtype) // 8))
    found: npt.NDArray[np.bool_] = unlike.any(axis=1)
    return found


def rounded(data: Bytes, source: str, target: str) -> Bytes:
    """Elements as ``target``, by cases and by value rather than by the carry that ``casts`` uses.

    What is cut off a float32 decides: more than half of the last kept place goes up, half goes to the even neighbour.
    """
    if source == target:
        return data
    if "float" not in source:
        raise TypeError(f"{source} is no floating point type")
    exact = None if source == "float32" and target == "bfloat16" else values(data, source)
    with np.errstate(over="ignore", invalid="ignore"):
        if exact is not None and target == "float16":
            return _nearest_half(exact).view(np.uint8)
        # Every type below float64 is a subset of float32.
        single = data.view("<f4") if exact is None else exact.astype("<f4")
    if target == "float32":
        return single.view(np.uint8)
    kept, cut = single.view("<u2")[1::2], single.view("<u2")[0::2]
    up = (cut > 0x8000) | ((cut == 0x8000) & (kept % 2 == 1))
    up &= np.isfinite(single)
    out = np.where(np.isnan(single), np.uint16(0x7FC0), kept + up.astype("<u2")).astype("<u2")
    return out.view(np.uint8)


def _nearest_half(exact: npt.NDArray[np.float64]) -> npt.NDArray[np.float16]:
    """float16 has 11 significant bits, at the least 2**-24; ``rint`` takes the even neighbour of a half."""
    _, exponent = np.frexp(exact)
    place = np.maximum(exponent - 11, -24)
    halves: npt.NDArray[np.float16] = np.ldexp(np.rint(np.ldexp(exact, -place)), place).astype("<f2")
    return halves


def bits(data: Bytes, dtype: str) -> npt.NDArray[np.uint64] | npt.NDArray[np.uint32] | npt.NDArray[np.uint16] | Bytes:
    """Bytes as one unsigned integer for each element (two for complex128)."""
    size = min(8, width(dtype))
    view: npt.NDArray[np.uint32] = data.view(f"<u{size}")
    return view


_VALUES = {
    "bool": "u1", "int8": "i1", "uint8": "u1", "int4": "i1", "int16": "<i2", "uint16": "<u2", "int32": "<i4",
    "uint32": "<u4", "int64": "<i8", "uint64": "<u8", "float16": "<f2", "float32": "<f4", "float64": "<f8",
}  # fmt: skip


def values(data: Bytes, dtype: str) -> npt.NDArray[np.float64] | None:
    """Elements as float64, None for a type that is no real number.  Exact but for integers beyond 2**53."""
    if dtype == "bfloat16":
        halves = np.zeros(data.size, "<u2")
        halves[1::2] = data.view("<u2")
        data, dtype = halves.view(np.uint8), "float32"
    code = _VALUES.get(dtype)
    # A signalling NaN makes numpy warn where it is merely widened.
    with np.errstate(invalid="ignore"):
        return None if code is None else data.view(code).astype(np.float64)


def show_element(data: Bytes, dtype: str, index: int) -> str:
    """One element for a message: its value, and its bits for a real number."""
    size = width(dtype)
    one = data[index * size : (index + 1) * size]
    if dtype == "str":
        return repr(one.tobytes().decode("utf-32-le", "replace"))
    number = f"0x{one.tobytes()[::-1].hex()}"
    if dtype in _VALUES and "float" not in dtype:
        return str(one.view(_VALUES[dtype])[0])
    value = values(one, dtype)
    return number if value is None else f"{value[0]:.9g} ({number})"
