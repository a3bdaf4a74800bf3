"""The machinery behind agent.py, one module for each concern; each imports only from those above it.

machine    what this computer is: profile, sizes, compiler; torch is imported by its functions alone
records    Proposal, Run, Verdict, Result; which runs count; text of children
files      what a child may have made: copied, counted, deleted
card       nvidia-smi: free memory, the wait for a full card
git        commits, refs and merges by plumbing
screen     what is refused before any training time is spent
hyperparameters   the numbers at the top of train.py
cache      compile caches: what a run begins with, and what of its own is kept
journal    the record of a night: rows that are appended whole or not at all
child      one child process, watched and ended with all that it started
place      where runs are made: folder, device, sandbox, rows
night      a night's folder and state; recording
text       the training rows, in a run's folder while its clock runs
start      a new night, or one that goes on
trial      what a new sandbox has to prove, run inside it
sandbox    what a child sees of the computer, and the trial child
run        measure(): train and score one (source, seed)
worker     one of several devices, in a process of Ray's
fleet      --workers: runs handed to workers, their results taken in
propose    the next proposal, made beside the runs; replays, and a person's own train.py
tune       the numeric search
prompt     what a model sees
researcher a model, whoever serves it: replies, turns, outages
claude     the Messages API
command    any program
check      --check and --ablate
arguments  the command line
view       the terminal
score      the scorer, frozen with the night: it imports constants and prepare alone
"""
