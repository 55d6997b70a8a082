"""The expansion of a loss in the noise on the weights: rules of Taylor-mode differentiation, and the terms that training adds."""
