"""Which tokens of a call run densely and which sparsely, and what that costs."""
