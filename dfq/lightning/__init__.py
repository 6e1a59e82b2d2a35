"""The plug-in for PyTorch Lightning projects."""
