"""Every table of the paper as a command: train, measure, print ours beside theirs, and judge.

Sadat et al. 2024 (arXiv 2405.14477). `tables` says what the paper prints and claims, `scales` how
a row's recipe is made smaller, `plan` what there is to train, and `job` does it.
"""
