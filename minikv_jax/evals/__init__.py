"""How good is a compressed cache? Tasks, and a runner that measures every method on them.

task.py      what a task is: cases, and how a batch of them is measured
tasks.py     the table of tasks; each is one file
engine.py    one prefill for all methods, and reading on exactly as `decode_step` does
known.py     measuring with continuations that are known in advance
store.py     finished items on disk
run.py       what is missing, measured batch by batch
summary.py   figures with intervals, tables
picture.py   quality against bits, retrieval over depth and length
"""
