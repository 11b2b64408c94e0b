r"""How an encoder is scaled: how its weights are drawn, and what the result of its pool is divided by.

Both decide together how strongly a fresh encoder's inner loss is curved, and so which ``lr`` fits it:

- ``"conditioned"``: He-normal weights and zero biases. The pool of R rows from N elements of C channels is divided by

  .. math::
      \sqrt{\frac{R\,S}{0.35\,(C+1)\,N}}\;\Big(1 + \sqrt{(C+1)\,e/D}\Big),

  which makes the largest eigenvalue of the inner Hessian about 0.7, whatever the sizes (between 0.2 and 2 nearly
  always). S is how the squared norm of a sum over rows grows: R for a sum; 1 + R/P for FSPool, whose rank weights are
  alike in stretches of R/P, P the number of pieces; 1/R for a mean; and about 0.8 N^(7/8)/R for a maximum, of
  which few rows partake. The bracket is the edge of a random matrix of D features and as many directions as e elements
  have that move apart: (N + R/P)/S for FSPool, else 1.
- ``"dspn"``, as the code of Zhang et al. (NeurIPS 2019): Xavier-uniform weights, zero biases; FSPool is divided by R.
- ``"idspn"``, as the code of Zhang et al. (ICLR 2022): what `nn.Linear` draws; FSPool is divided by sqrt(R), since its
  weights there, one for each rank, have standard deviation 1/sqrt(R).

FSPool's weights are standard normal at the knots in all three.
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
        # Of shapes alone, which may be symbols while exporting: no branch on them, and of powers the square root only.
        spread, apart = 1.0 * rows, 1.0
        if pool.fspool is not None:
            spread = 1 + rows / pool.fspool.pieces
            apart = (size + rows / pool.fspool.pieces) / spread
        elif pool.kind == "mean":
            spread = 1 / rows
        elif pool.kind == "max":
            spread = 0.8 * size / ((size**0.5) ** 0.5) ** 0.5 / rows
        edge = 1 + (inputs * apart / features) ** 0.5
        scale: float = (rows * spread / (0.35 * inputs * size)) ** 0.5 * edge
        return scale
    if pool.fspool is None:
        return 1
    return rows if scaling == "dspn" else rows**0.5
