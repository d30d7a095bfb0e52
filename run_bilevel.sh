#!/bin/sh
# JTDS from nothing to its test accuracy, which is the last line printed.
#
#   sh run_bilevel.sh                                       the settings below
#   sh run_bilevel.sh --corrupted 1 --corrupted_rate 0.4    any flag of train_bilevel.py, see --help
#   sh run_bilevel.sh --method joint_stable                 another method
#   sh run_bilevel.sh --data_root /data/CUB_200_2011        data in CUB's layout
#   sh run_bilevel.sh --data_root photos                    one folder of images per class
#   sh run_bilevel.sh --split_dir my_split                  what data_preprocess.py wrote there
#   sh run_bilevel.sh table4 --dataset mini                 a table of the paper: table2 | table3 |
#                                                           table4 | all, see reproduce_tables.py
#
# Without any of these it trains on what data_preprocess.py wrote to preprocess_data/ here, else on
# CUB_200_2011/ here or in the current folder, else on the embedded miniature.
set -eu

# ---- settings: edit here; a flag on the command line wins ----------------------------------------

corrupted=0          # 1: corrupt the training labels of the target task (the paper's Table 4) ...
corrupted_rate=0.2   # ... each with this probability; the paper has 0.2, 0.4, 0.6
labeled_per_class=0  # 5: semi-supervised, 5 labels per class (Table 3); 0: supervised (Table 2)

# joint is JTDS as published. Take joint_stable where training labels are wrong or learning rates
# are not tuned (docs/stability.md). The others: naive | task | linear | common | common_dev |
# uncertainty | gcs | pcgrad_target | dwa | autolambda | l2rw | mwn | slgrad | single.
method=joint
seed=5

# Data in CUB's layout: the paper's settings (upper_* for joint alone).
epochs=100
train_batch_size=64
upper_lr=1e-2
upper_decay=5e-5

# Other data, and the miniature.
small_epochs=40
small_train_batch_size=32
small_dev_batch_size=20

# The backbone, its initial weights, the size of its images and its learning rate follow from the
# data: ResNet-18 at 224 pixels with ImageNet weights and 1e-4, as in the paper; for small images
# and for rows a small network from random weights and 1e-3. Flags change them.

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

# Some of train_bilevel.py's flags decide what is preprocessed and with which settings.
data_root='' split_dir='' preset='' previous=''
for argument in "$@"; do
    shift
    case $previous in
    --data_root) data_root=$argument previous='' && continue ;;
    --split_dir) split_dir=$argument previous='' && continue ;;
    --method) method=$argument ;;
    esac
    previous=$argument
    case $argument in
    --data_root | --split_dir) continue ;;
    --data_root=*) data_root=${argument#*=} && continue ;;
    --split_dir=*) split_dir=${argument#*=} && continue ;;
    --method=*) method=${argument#*=} ;;
    --preset | --preset=*) preset=given ;;
    -h | --help) exec "$python" "$here/train_bilevel.py" --help ;;
    esac
    set -- "$@" "$argument"
done

prepare() {
    "$python" "$here/data_preprocess.py" "$@" --out_dir "$split_dir"
}
is_prepared() {
    [ -f "$1/split_info.json" ]
}
is_prepared_from_data_root() {
    is_prepared "$split_dir" && "$python" -c "import json, os, sys
root, info = sys.argv[1:]
sys.exit(json.load(open(info))['data_root'] != os.path.abspath(root))
" "$data_root" "$split_dir/split_info.json"
}

record=$here/bird_record split_given=$split_dir generated=''
if [ -n "$data_root" ] && is_prepared "$data_root"; then
    split_dir=$data_root data_root=''
elif [ -z "$data_root$split_given" ] && ! is_prepared "$here/preprocess_data"; then
    for candidate in ./CUB_200_2011 "$here/CUB_200_2011"; do
        [ -d "$candidate" ] && data_root=$candidate && break
    done
fi
split_dir=${split_dir:-$here/preprocess_data}
if [ -n "$data_root" ]; then
    if [ -f "$data_root/images.txt" ] || [ -d "$data_root/images" ] || ! [ -d "$data_root" ]; then
        prepare --data_root "$data_root"
    elif ! is_prepared_from_data_root; then
        prepare --images "$data_root"
    fi
elif ! is_prepared "$split_dir" && [ -z "$split_given" ]; then
    echo "##### NO DATA FOUND: TRAINING ON THE EMBEDDED MINIATURE, NOT ON CUB #####"
    split_dir=$here/miniature/preprocess_data record=$here/miniature/bird_record generated=1
    prepare --generate mini --data_root "$here/miniature/data"
fi

if [ -z "$preset" ]; then # whose settings would not win over flags
    if [ -z "$generated" ] && [ -f "$split_dir/image_dictionary.json" ]; then # CUB's layout
        if [ "$method" = joint ]; then
            set -- --upper_lr "$upper_lr" --upper_decay "$upper_decay" "$@"
        fi
        set -- --epochs "$epochs" --train_batch_size "$train_batch_size" "$@"
    else
        set -- --epochs "$small_epochs" --train_batch_size "$small_train_batch_size" \
            --dev_batch_size "$small_dev_batch_size" "$@"
    fi
    set -- --method "$method" "$@"
fi

exec "$python" "$here/train_bilevel.py" ${data_root:+--data_root "$data_root"} \
    --split_dir "$split_dir" --record_dir "$record" --corrupted "$corrupted" \
    --corrupted_rate "$corrupted_rate" --labeled_per_class "$labeled_per_class" --seed "$seed" "$@"
