"""GPT-2 124M on OpenWebText with squared ReLU and 2:4 activations: act24, dense weights (methods/act24.py).

Reproduces no published number: it is the paper's GPT-2 run (config/train_gpt2_sparse.py) with another method. Its
baseline is the same run with --sparse=none, which is dense squared ReLU. The best learning rate at this size is not
known. Costs 300k steps of 524,288 tokens, 157 billion tokens; the time on a GPU is not measured yet. On 8 GPUs:

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_act24.py
"""

out_dir = "out-gpt2-act24"
dataset = "openwebtext"

# 8 sequences x 1024 tokens x 64 micro-batches = 524,288 tokens a step
batch_size = 8
block_size = 1024
gradient_accumulation_steps = 64

n_layer = 12
n_head = 12
n_embd = 768
activation = "relu2"  # act24 needs it: its hidden activations are mostly zero

sparse = "act24"  # with a dense start of 5 % of the steps, and no dense end

learning_rate = 1.5e-4
min_lr = 1e-5
warmup_iters = 3000
max_iters = 300000
lr_decay_iters = 300000

eval_interval = 1000
eval_iters = 200
log_interval = 10
