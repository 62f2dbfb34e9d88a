"""A dense character-level GPT on Tiny Shakespeare: nanoGPT's first example, for one GPU.

Reproduces nanoGPT's config/train_shakespeare_char.py, which reports a best validation loss of 1.4697. Its cost
is not measured yet. On a CPU use the smaller sizes of config/demo.py.
"""

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # the model overfits a million characters soon

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 5000
lr_decay_iters = 5000
beta2 = 0.99

eval_interval = 250
eval_iters = 200
always_save_checkpoint = False  # save only the best one, as ckpt_best.pt
