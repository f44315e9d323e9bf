"""DP-SGD: norms and clipping of rows, noise, sampling and accounting (docs/privacy.md)."""
