"""A sparse pre-training run to watch: a small character-level GPT on the source of Python's standard library.

Reproduces nothing. Costs minutes on a CPU (results/demo/metrics.jsonl). 0.8M parameters, 1000 steps of 768 tokens:
833 with 2:4 sparse feed-forward layers (fst), the last 167 dense. The decay factor is the one that studies.search_decay
recommends for it (results/search_decay-demo.json).
"""

out_dir = "out-demo"
dataset = "pystdlib_char"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 6
gradient_accumulation_steps = 2  # so that two ranks can share a step

sparse = "fst"  # masks every 40 steps, and the last 1/6 of the steps dense
masked_decay = 6e-3

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 1000
lr_decay_iters = 1000
beta2 = 0.99

eval_interval = 100
eval_iters = 40
log_interval = 20
flip_interval = 5
checkpoint_interval = 250
compile = False  # compiling would take longer than it saves here
