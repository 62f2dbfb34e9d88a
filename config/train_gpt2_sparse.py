"""GPT-2 124M on OpenWebText with 2:4 sparse feed-forward layers: the paper's fully sparse training (FST).

Reproduces the row "124M, ours" of the paper's Table 5: validation loss 2.952 there, against 2.907 dense. Decay factor
from its Table 1, learning rate and schedule from its code. Costs 300k steps of 524,288 tokens, 157 billion tokens;
the time on a GPU is not measured yet. On 8 GPUs:

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_sparse.py
"""

out_dir = "out-gpt2-sparse"
dataset = "openwebtext"

# 8 sequences x 1024 tokens x 64 micro-batches = 524,288 tokens a step
batch_size = 8
block_size = 1024
gradient_accumulation_steps = 64

n_layer = 12
n_head = 12
n_embd = 768

sparse = "fst"  # with masked_decay=6e-5, masks every 40 steps, and the last 1/6 of the steps dense

learning_rate = 1.5e-4
min_lr = 1e-5
warmup_iters = 3000
max_iters = 300000
lr_decay_iters = 300000

eval_interval = 1000
eval_iters = 200
log_interval = 10
