"""Published coefficients of the iterations in ``optim.orthogonalize``.

A table belongs to one normaliser, which first brings the singular values below one; the two are
kept together in :class:`Table` and never mixed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Row = tuple[float, float, float]


class Table(NamedTuple):
    """The coefficients of an iteration and the normaliser that they were made for.

    Args:
        rows: The coefficients ``(a, b, c)`` of every step.
        margin: The factor of the Frobenius norm by which the input is divided.
        tail: The row that is repeated after the last one, or None if the length is fixed.
        steps: The number of steps that the table is published for.
        preconditioner: The word "frobenius" or "aol" (rows scaled by inverse roots of the Gram's
            row sums).
        narrow: True if 16-bit products are safe; otherwise products are computed in float32.
    """

    rows: tuple[Row, ...]
    margin: float = 1.0
    tail: Row | None = None
    steps: int = 5
    preconditioner: str = "frobenius"
    narrow: bool = True


def _with_safety(rows: Sequence[Row], safety: float) -> tuple[Row, ...]:
    """The polynomials p(x / safety): rounding may push a singular value slightly above one."""
    return tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in rows)


_JORDAN = (3.4445, -4.7750, 2.0315)
_CLASSICAL = (1.875, -1.25, 0.375)
# Minimax quintics for the interval [1e-3, 1], each composed on the range of the one before.
_POLAR_EXPRESS: tuple[Row, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)

TABLES: dict[str, Table] = {
    "jordan": Table((_JORDAN,), tail=_JORDAN),
    "you5": Table(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        )
    ),
    "you6": Table(
        (
            (3955 / 1024, -8306 / 1024, 5008 / 1024),
            (3735 / 1024, -6681 / 1024, 3463 / 1024),
            (3799 / 1024, -6499 / 1024, 3211 / 1024),
            (4019 / 1024, -6385 / 1024, 2906 / 1024),
            (2677 / 1024, -3029 / 1024, 1162 / 1024),
            (2172 / 1024, -1833 / 1024, 682 / 1024),
        ),
        steps=6,
    ),
    # As the authors run it: the safety factor enters the rows and the normaliser.
    "polar_express": Table(_with_safety(_POLAR_EXPRESS, 1.01), margin=1.01, tail=_CLASSICAL),
    "polar_express_speedrun": Table(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        margin=1.02,
    ),
    "polar_express_gram": Table(_with_safety(_POLAR_EXPRESS[:5], 1.05)),
    "cans5": Table(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        # Values reach the edge of what the next polynomial contracts: bfloat16 diverges (5e11).
        narrow=False,
    ),
    # The corrected table. The one before it changes the sign of large singular values.
    "aol4": Table(
        (
            (4.6051, -9.6552, 5.6769),
            (4.7505, -6.0861, 2.1790),
            (2.7763, -2.3190, 0.5523),
            (2.4231, -2.2861, 0.8193),
        ),
        steps=4,
        preconditioner="aol",
    ),
    "cubic5": Table(
        (
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        )
    ),
    "deepseek10": Table((_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2, steps=10),
    "classical": Table((_CLASSICAL,), tail=_CLASSICAL),
}


def rows_of(
    coeffs: str | Sequence[float] | Sequence[Sequence[float]], steps: int | None
) -> tuple[Table, tuple[Row, ...]]:
    """A table and its coefficients, one row per step.

    Args:
        coeffs: The name of a table in ``TABLES``, one row ``(a, b, c)`` to repeat, or rows.
        steps: The number of steps; None for the number the table was published for.

    Returns:
        The table and as many rows as steps.

    Raises:
        ValueError: :func:`jaxlib_unlearn.optim.orthogonalize.newton_schulz` lists the cases.

    Example:
        >>> rows_of("jordan", 2)[1]
        ((3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315))
    """
    if isinstance(coeffs, str):
        if coeffs not in TABLES:
            raise ValueError(f"unknown coefficients {coeffs!r}; known: {', '.join(TABLES)}")
        table = TABLES[coeffs]
    else:
        array = np.asarray(coeffs, float)
        if array.shape == (3,):
            row: Row = tuple(array.tolist())  # type: ignore[assignment]
            table = Table((row,), tail=row)
        elif array.ndim == 2 and array.shape[0] > 0 and array.shape[1] == 3:
            table = Table(tuple(tuple(r) for r in array.tolist()), steps=len(array))  # type: ignore
        else:
            raise ValueError(f"coefficients are (3,) or (steps, 3), got shape {array.shape}")
    steps = table.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    if table.tail is None and steps != len(table.rows):
        raise ValueError(f"{coeffs!r} has {len(table.rows)} steps, got steps={steps}")
    rows = table.rows[:steps]
    if table.tail is not None:
        rows += (table.tail,) * (steps - len(rows))
    a, b, c = rows[0]
    squares = np.linspace(0.0, 1.0, 1001)[1:]
    if np.min(a + b * squares + c * squares**2) <= 0:
        raise ValueError(f"the first polynomial {rows[0]} is not positive on (0, 1]: signs turn")
    return table, rows
