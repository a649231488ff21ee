"""What a recipe takes of this machine, and what is missing, before days of training are begun.

`costs` works a step out on paper (`counting`), `room` its memory and disk; `trial` times it on
synthetic images (`rehearsal`); `checks` look for data, weights and devices; `diagnosis` says it.
"""
