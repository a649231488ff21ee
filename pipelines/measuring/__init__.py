"""What `pipelines.evaluate` and `pipelines.fid` measure with.

Both see every image once (`survey`), through a network (`features`), and know images by their
pixels (`fingerprints`).

Reconstructions: `evaluation_plan` says what is measured and looks for images that were trained on
(`overlap`); `reconstruction` is the loop, `evaluation` its result, `evaluation_table` the printed
one; `instruments` are what needs weights.

Samples: `settings` say how; `model_samples` are one side, `reference`, `kept_statistics` and
`statistics_file` the other, `image_pass` goes over either; `comparability` with `preparation`
refuses what would mean nothing, and `bootstrap` puts an interval about FID.

`result_names` say where either is kept.
"""
