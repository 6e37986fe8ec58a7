"""What runs of the applications share: files, logs, order, checkpoints, options, command lines and training aids.

It needs the extra `gspn-core[runs]`; the operator imports none of it.

    files         files and folders that are replaced whole; the record of what a folder was made with
    images        image files, decoded in one way
    logs          CSV tables and TensorBoard that continue after a resume
    order         which items an update sees, and seeds, as functions of counters
    checkpoints   the folder of a run's checkpoints, weights, the optimizer's state
    options       a dataclass as command line, YAML files and the record of a run
    cli           the `main` of every command: results, errors, exit statuses
    errors        errors that mean that the work failed, not that the call was wrong
    training      device and precision, learning rate, averaged weights, what an update reports
"""
