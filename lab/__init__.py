"""The machinery behind agent.py, one module for each concern; each imports only from those above it.

records   Proposal, Run, Verdict, Result; which runs count; text of children
files     what a child may have made: copied, counted, deleted
card      nvidia-smi: free memory, the wait for a full card
git       commits, refs and merges by plumbing
screen    what is refused before any training time is spent
night     a night's journal and state; recording
start     a new night, or one that goes on
sandbox   what a child sees of the machine, and the trial child
run       one child process; measure()
propose   proposers without a model
prompt    what a model sees
claude    the Messages API
check     --check and --ablate
view      the terminal
score     the scorer, frozen with the night: it imports constants and prepare alone
"""
