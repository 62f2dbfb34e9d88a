"""Dense GPT-2 124M on OpenWebText: the baseline beside train_gpt2_sparse.py, with the paper's schedule.

The paper's dense run reached a validation loss of 2.907 (its Table 5). Data, schedule and model are those of
train_gpt2_sparse.py. It costs 300k steps, 157 billion tokens; the time on a GPU is not measured yet. On 8 GPUs:

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""

out_dir = "out-gpt2"
dataset = "openwebtext"

# 8 sequences x 1024 tokens x 64 micro-batches = 524,288 tokens a step, 157 billion in 300k steps
batch_size = 8
block_size = 1024
gradient_accumulation_steps = 64

n_layer = 12
n_head = 12
n_embd = 768

learning_rate = 1.5e-4
min_lr = 1e-5
warmup_iters = 3000
max_iters = 300000
lr_decay_iters = 300000

eval_interval = 1000
eval_iters = 200
log_interval = 10
