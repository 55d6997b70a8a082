"""Random resizing and padding (Xie et al. 2018) as a plug-in of Rayndom."""
