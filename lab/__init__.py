"""The machinery behind agent.py. Its folders are the words of the loop; imports run one way, from above to below.

records      Proposal, Run, Verdict, Result; which runs count; text of children, cleaned
machine      what this computer is: profile, sizes, compiler, free memory of the card
measure/     one run: train and score a source on a seed
  score        the scorer and its two children; frozen with the night: it imports constants and prepare alone
  files        what a child may have made: copied, counted, deleted
  child        one child process, watched and ended with all that it started
  place        where runs are made: folder, device, sandbox, rows
  trial        what a new sandbox has to prove, run inside it
  sandbox      what a child sees of the computer
  run          train, score, read what came out; the text at the clock; the compile cache
record/      what a night knows and keeps
  git          commits, refs and merges by plumbing
  journal      rows of JSON, appended whole or not at all
  night        the state of a night, how an experiment is recorded, and measure()
  start        a new night, or one that goes on
propose/     the next idea
  screen       what is refused before any training time is spent
  ahead        the next proposal, made while experiments run; --try
  replay       an earlier night again
  tune         the numbers of train.py, and the search over them
  prompt       what a model sees
  model        what its reply means, whose turn it is, outages
  claude       the Messages API
  command      any program
fleet        several devices at once, on Ray
check        --check, --ablate, --dry
arguments    the command line
progress     the picture of a night
view         the terminal
"""
