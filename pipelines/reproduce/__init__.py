"""The paper's tables and figures as commands (Sadat et al. 2024, arXiv 2405.14477).

A small build cache: each row of a table is a target, built unless its record is up to date.

tables    the paper's tables: rows, columns, numbers, claims, and whether these hold here
plan      what a table needs at a scale: recipes, and the folders of their runs
rows      build one row: get its model, and measure it
runner    the cache and the loop: target → up to date? → build → judge → print
output    a result as text, Markdown and JSON
figures   the paper's figures, drawn from trained rows
"""
