"""The paper's tables and figures as commands (Sadat et al. 2024, arXiv 2405.14477).

A small build cache: each row of a table is a target, built unless its record is up to date.

tables    the paper's tables: rows, columns, numbers, claims, and whether these hold here
plan      what a table needs at a scale: recipes, and the folders of their runs
rows      build one row: get its model, and measure it
figures   the paper's figures, of models that rows train
runner    the cache and the loop: target → up to date? → build → judge → print
output    a result as text, Markdown and JSON

<out>/<scale>/<table>/
  table.md, table.json   the result
  <row>/row.json         the record: numbers, settings, model, machine, versions, command, time
  <row>/images.npz       the numbers of every image, to compare rows by
  <row>/autoencoder/     the run of stage one, if this row is the first with its recipe
  <row>/diffusion/       likewise the run of stage two; its samples in samples/
<out>/seed-<k>/              the same of another seed, with --seeds
<out>/<scale>/ae/<preset>/   a stage one that belongs to no row
<out>/<scale>/<figure>/      the pictures of a figure, and their numbers
"""
