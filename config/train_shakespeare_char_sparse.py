"""The same character-level GPT as train_shakespeare_char.py, with 2:4 sparse feed-forward layers (fst).

Reproduces nothing published: it is the smallest sparse run worth a GPU. Its cost is not measured yet.
"""

out_dir = "out-shakespeare-char-sparse"
dataset = "shakespeare_char"

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # the model overfits a million characters soon

sparse = "fst"  # masks every 40 steps, and the last 1/6 of the steps dense
masked_decay = 2e-4

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 5000
lr_decay_iters = 5000
beta2 = 0.99

eval_interval = 250
eval_iters = 200
always_save_checkpoint = False  # save only the best one, as ckpt_best.pt
