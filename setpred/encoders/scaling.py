r"""How an encoder is scaled: how its weights are drawn, and what the result of its pool is divided by.

Both together decide how strongly the inner loss of a fresh encoder is curved, and so which ``lr`` fits it:

- ``"conditioned"``: He-normal weights and zero biases. The pool of R rows, made of N elements of C channels, is divided
  by

  .. math::
      \sqrt{\frac{R\,S}{0.35\,(C+1)\,N}}\;\Big(1 + \sqrt{(C+1)\,e/D}\Big),

  so that the largest eigenvalue of the inner Hessian is about 0.6, whatever the sizes (nearly always from 0.2 to 2).
  S says how the square of what is pooled grows with the rows: R for a sum and 1/R for a mean, where they move
  together; 1 + R/P for FSPool, whose random weights are alike in stretches of R/P ranks, P its pieces; and N/(2R) for
  a maximum, of which an element holds about half. The bracket is the edge of a random matrix of D features and the
  directions in which e elements move apart: (N + R/P)/S for FSPool, else 1.
- ``"dspn"``, the code of Zhang et al. (NeurIPS 2019): Xavier-uniform weights and zero biases; FSPool is divided by R.
- ``"idspn"``, the code of Zhang et al. (ICLR 2022): what `nn.Linear` draws; FSPool is divided by the square root of R,
  since its weights there, one for each rank, are drawn with a standard deviation of 1/sqrt(R), and nothing is divided.

FSPool's weights at its knots are standard normal in all three.
"""

from typing import Literal, get_args

from torch import nn

from setpred.encoders.pool import Pool

Scaling = Literal["conditioned", "dspn", "idspn"]
SCALINGS = get_args(Scaling)


def draw(layer: nn.Linear, scaling: Scaling) -> None:
    """Draw a layer's weights and biases."""
    if scaling == "idspn":
        layer.reset_parameters()
        return
    if scaling == "dspn":
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)


def divisor(scaling: Scaling, pool: Pool, size: int, rows: int, inputs: int, features: int) -> float:
    """Return what the pool of ``rows`` rows is divided by, for sets of ``size`` elements of ``inputs`` channels."""
    if scaling == "conditioned":
        # While exporting, sizes may be symbols: no branch on them, and of powers the square root alone.
        spread, apart = 1.0 * rows, 1.0
        if pool.fspool is not None:
            spread = 1 + rows / pool.fspool.pieces
            apart = (size + rows / pool.fspool.pieces) / spread
        elif pool.kind == "mean":
            spread = 1 / rows
        elif pool.kind == "max":
            spread = size / (2 * rows)
        edge = 1 + (inputs * apart / features) ** 0.5
        whole: float = (rows * spread / (0.35 * inputs * size)) ** 0.5 * edge
        return whole
    if pool.fspool is None:
        return 1
    return rows if scaling == "dspn" else rows**0.5
