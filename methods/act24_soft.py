"""2:4 activations and soft-thresholded 2:4 weights: all six products of a feed-forward layer are 2:4.

As act24.py, but Z and dA multiply S-STE's weights, beta S(W1), 2:4 along d, and beta S(W2^T), 2:4 along d. They need
not be transposable: Y and dX are 2:4 by their activations, and multiply the same weights as dense matrices. The
gradient of W is the true one, beta J^T dW, J the Jacobian of S (see s_ste in sparse24.py). beta1 and beta2 are set at
the end of the dense start and then fixed, also for a layer that joins later.

    Z  = X C(S1)^T      dA = dY C(S2)        S1 = beta1 S(W1)      S2^T = beta2 S(W2^T)
    Y  = C(A) S2^T      dX = C(dZ) S1        dW1, dW2 as in act24.py, then times beta J^T
"""

from dataclasses import replace

from methods import act24

RECIPE = replace(act24.RECIPE, name="act24_soft", mask="soft", mask_interval=1, weight_gradient="true")
