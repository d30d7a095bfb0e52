#!/bin/sh
# JTDS from nothing to its test accuracy, which is the last line printed.
#
#   sh run_bilevel.sh                                       the settings below
#   sh run_bilevel.sh --corrupted 1 --corrupted_rate 0.4    any flag of train_bilevel.py, see --help
#   sh run_bilevel.sh --method joint_stable                 another method
#   sh run_bilevel.sh --data_root /data/CUB_200_2011        CUB from another place
#   sh run_bilevel.sh table4 --dataset mini                 a table of the paper: table2 | table3 |
#                                                           table4 | all, see reproduce_tables.py
#
# Without a CUB_200_2011/ in the current folder, in this script's folder or at --data_root, the
# embedded miniature is trained instead: other data, other folders, other settings.
set -eu

# ---- settings: edit here; a flag on the command line wins ----------------------------------------

corrupted=0          # 1: corrupt the training labels of the target task (the paper's Table 4) ...
corrupted_rate=0.2   # ... each with this probability; the paper has 0.2, 0.4, 0.6
labeled_per_class=0  # 5: semi-supervised, 5 labels per class (Table 3); 0: supervised (Table 2)

# joint is JTDS as published. Take joint_stable where training labels are wrong or learning rates
# are not tuned (docs/stability.md). The others: naive | task | linear | common | common_dev |
# uncertainty | gcs | single.
method=joint
seed=5

# CUB-200-2011: joint has the paper's settings; the others have the paper's lower level.
preset=paper
epochs=100
train_batch_size=64
main_lr=1e-4

# The miniature: a small network from random weights, so other steps.
mini_epochs=40
mini_train_batch_size=32
mini_main_lr=1e-3

# ---- process settings: faster on the CPU, same results (benchmarks/ measures what they bring) --------

# glibc hands large blocks back to the system after each step and pays for every page again.
: "${MALLOC_TRIM_THRESHOLD_:=100000000000}" "${MALLOC_TOP_PAD_:=268435456}" "${MALLOC_MMAP_MAX_:=0}"
# OpenMP threads that spin at a barrier stop everything when another process wants their core.
: "${OMP_WAIT_POLICY:=PASSIVE}"
export MALLOC_TRIM_THRESHOLD_ MALLOC_TOP_PAD_ MALLOC_MMAP_MAX_ OMP_WAIT_POLICY

# --------------------------------------------------------------------------------------------------

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
. "$here/environment.sh"
case ${1-} in
table2 | table3 | table4 | all | tune)
    find_python requirements.txt requirements-tables.txt
    exec "$python" "$here/reproduce_tables.py" "$@"
    ;;
esac
find_python requirements.txt

# Three of train_bilevel.py's flags decide what is preprocessed and with which settings.
data_root=
split_dir=
previous=
for argument in "$@"; do
    case $previous in
    --data_root) data_root=$argument ;;
    --split_dir) split_dir=$argument ;;
    --method) method=$argument ;;
    esac
    case $argument in
    --preset | --preset=*) preset=command_line ;;
    --method=*) method=${argument#*=} ;;
    --data_root=*) data_root=${argument#*=} ;;
    --split_dir=*) split_dir=${argument#*=} ;;
    -h | --help) exec "$python" "$here/train_bilevel.py" --help ;;
    esac
    previous=$argument
done
for candidate in ./CUB_200_2011 "$here/CUB_200_2011"; do
    if [ -z "$data_root" ] && [ -d "$candidate" ]; then
        data_root=$candidate
    fi
done

if [ -n "$data_root" ]; then
    split_dir=${split_dir:-$here/preprocess_data}
    "$python" "$here/data_preprocess.py" --data_root "$data_root" --out_dir "$split_dir"
    set -- --record_dir "$here/bird_record" "$@"
    if [ "$method" = joint ] && [ "$preset" = paper ]; then
        set -- --preset paper "$@"
    fi
else
    echo "##### NO CUB_200_2011 FOUND: TRAINING ON THE EMBEDDED MINIATURE, NOT ON CUB #####"
    data_root=$here/miniature/data
    split_dir=${split_dir:-$here/miniature/preprocess_data}
    "$python" "$here/data_preprocess.py" --generate mini \
        --data_root "$data_root" --out_dir "$split_dir"
    epochs=$mini_epochs train_batch_size=$mini_train_batch_size main_lr=$mini_main_lr
    set -- --record_dir "$here/miniature/bird_record" --backbone convnet --image_size 64 \
        --dev_batch_size 20 "$@"
fi

if [ "$preset" != command_line ]; then # whose settings would not win over flags
    set -- --method "$method" --epochs "$epochs" --train_batch_size "$train_batch_size" \
        --main_lr "$main_lr" "$@"
fi

exec "$python" "$here/train_bilevel.py" --data_root "$data_root" --split_dir "$split_dir" \
    --corrupted "$corrupted" --corrupted_rate "$corrupted_rate" \
    --labeled_per_class "$labeled_per_class" --seed "$seed" "$@"
