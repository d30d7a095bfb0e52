#!/bin/sh
# The commands behind docs/stability.md, under its headings; run from the repository's root.
#
#   sh results/stability.sh              all of it: more than 500 runs
#   sh results/stability.sh --dry_run    the commands of all runs of tables, and their hours
#
# Pick the lines you need. The numbers of the page were made with earlier revisions (258af48 and
# before), whose --aux_lr, --aux_batch_size and --in_dim are --upper_lr, --dev_batch_size and
# --feature_dim here.
set -eu

dry_run=${1-}
tables="python reproduce_tables.py"
digits="--dataset digits --epochs 40"
tuned="$digits --hyperparameters results/digits_narrow/hyperparameters.json"
ten="--seeds 11 12 13 14 15 16 17 18 19 20"

# ---- What goes wrong: the figure; What the schedule learned --------------------------------------

if [ -z "$dry_run" ]; then
    python data_preprocess.py --generate digits --data_root digits/data --out_dir digits/preprocess_data
    run="python train_bilevel.py --split_dir digits/preprocess_data --record_dir digits/bird_record
      --backbone convnet --feature_dim 128 --image_size 16 --num_workers 0 --threads 1 --epochs 40
      --dev_batch_size 10 --corrupted 1 --corrupted_rate 0.6"
    $run --main_lr 2e-3 --method joint --upper_lr 1e-2 --exp_name released
    $run --main_lr 2e-3 --method joint --upper_lr 1e-3 --hyperstep 5 --exp_name often
    $run --main_lr 2e-3 --method joint_stable --exp_name stable
    sgd="--main_optimizer sgd --main_lr 5e-2"
    $run $sgd --method joint --upper_lr 1e-2 --exp_name sgd_released
    $run $sgd --method joint_stable --exp_name sgd_stable
    runs=digits/bird_record/noisy
    python benchmarks/plot_schedules.py --out docs/stability.png "JTDS as released=$runs/released" \
        "JTDS, ten times slower, more often=$runs/often" "joint_stable=$runs/stable" \
        "JTDS as released, lower SGD=$runs/sgd_released" \
        "joint_stable, lower SGD=$runs/sgd_stable"
    for name in released stable sgd_released sgd_stable; do
        python inspect_schedule.py "$runs/$name"
    done
    sh run_bilevel.sh --method joint_stable --corrupted 1 --corrupted_rate 0.4 --exp_name quick \
        --threads 1
    python inspect_schedule.py miniature/bird_record/noisy/quick
fi

# ---- What was changed: the target's share, 5 labels per class ------------------------------------

for rates in "--main_lr 5e-3 --aux_weight 1" "--main_lr 1e-2 --aux_weight 3"; do
    for share in fixed learned; do
        $tables table3 $digits --hyperparameters none $ten --methods joint_stable $dry_run \
            --run_flags="--feature_dim 8 --dev_epochs 30 $rates --option target_share=$share"
    done
done

# ---- What each change is worth -------------------------------------------------------------------

$tables table4 --settings corrupted_0.4 $tuned --run_flags="--feature_dim 8" $ten $dry_run \
    --methods joint_stable stable_equal stable_free_scale stable_fixed_share stable_gradient \
    stable_neumann stable_sgd stable_no_warmup stable_one_batch stable_held_out \
    stable_no_fine_tuning --out_dir results/digits_narrow/ablations
$tables table4 --settings corrupted_0.6 $tuned --run_flags="--feature_dim 8" $ten $dry_run \
    --methods joint_stable stable_equal stable_gradient stable_no_warmup \
    --out_dir results/digits_narrow/ablations_60
# the learned share, clean labels
$tables table2 $tuned --run_flags="--feature_dim 8" $ten $dry_run \
    --methods joint_stable stable_fixed_share
# the warm-up, on further seeds
further="--seeds 301 302 303 304 305 306 307 308 309 310 --methods joint_stable stable_no_warmup"
$tables table4 --settings corrupted_0.4 corrupted_0.6 $tuned --run_flags="--feature_dim 8" \
    $further $dry_run
$tables table4 --settings corrupted_0.4 --dataset mini $further $dry_run
$tables table2 --dataset mini $further --hyperparameters none $dry_run \
    --run_flags="--main_lr 5e-3 --dev_epochs 30 --upper_lr 3e-2"
# added alone to JTDS
for change in "" "--precondition adam --solver identity" \
    "--upper_optimizer adam --max_grad_norm 0 --upper_lr 0.03" "--hold_out_dev 0" \
    "--n_meta_train_loss_accum 4" "--warmup_epochs 5"; do
    $tables table4 --settings corrupted_0.4 $tuned $ten --methods joint $dry_run \
        --run_flags="--feature_dim 8 $change"
done
$tables table4 --settings corrupted_0.4 $tuned $ten --methods joint_stable $dry_run \
    --run_flags="--feature_dim 8 --main_lr 2e-3 --precondition none --solver neumann
    --upper_optimizer sgd --max_grad_norm 10 --upper_lr 0.01 --n_meta_train_loss_accum 1
    --hold_out_dev 1 --warmup_epochs 0 --dev_epochs 0"

# ---- How much its two settings matter ------------------------------------------------------------

for setting in "--upper_lr 0.01" "--upper_lr 0.03" "--upper_lr 0.1" "--upper_lr 0.3" \
    "--hyperstep 2" "--hyperstep 10" "--hyperstep 20"; do # the data set's interval is 5
    $tables table4 --settings corrupted_0.6 $digits --hyperparameters none \
        --seeds 11 12 13 14 15 --methods joint_stable $dry_run \
        --run_flags="--feature_dim 8 --main_lr 1e-2 --dev_epochs 30 $setting"
done

# ---- ResNet-18, and SGD on the lower level -------------------------------------------------------

resnet="table4 --settings corrupted_0.4 --dataset digits --hyperparameters none"
resnet="$resnet --methods common_dev joint_stable"
flags="--backbone resnet18 --backbone_pretrain 0 --feature_dim 512 --image_size 32 --main_lr 1e-3"
$tables $resnet --epochs 40 --seeds 301 302 303 304 305 306 $dry_run \
    --run_flags="$flags --train_batch_size 64"
$tables $resnet --epochs 20 --seeds 11 12 13 14 $dry_run --run_flags="$flags"
sgd="--methods common_dev joint joint_stable"
sgd="$sgd --hyperparameters results/digits_narrow/sgd/hyperparameters.json"
$tables tune --tables table4 $digits $sgd $dry_run \
    --run_flags="--feature_dim 8 --main_optimizer sgd --main_lr 2e-2"
$tables table4 --settings corrupted_0.4 corrupted_0.6 $digits $sgd $ten $dry_run \
    --run_flags="--feature_dim 8 --main_optimizer sgd" --out_dir results/digits_narrow/sgd
