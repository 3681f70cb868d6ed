"""Train or evaluate MobileOne on one device: the first GPU, or the CPU if there is no GPU.

  python main_single_gpu.py -cfg configs/mobileone_s0.yaml -data_path /dataset/imagenet
  python main_single_gpu.py -cfg configs/mobileone_s0.yaml -data_path /dataset/imagenet -eval -pretrained s0.pdparams

Writes config.yaml, run.json, log.txt, log.jsonl, latest.pdparams, best.pdparams, and epoch_N.pdparams to the run's
folder (-output).
"""
from config import get_config, get_parser, update_config
from runtime.program import environment_number, prepare_runtime, run_program, use_device
from runtime.settings import add_device_flag
from utils import UserError


def main():
    parser = get_parser(__doc__)
    add_device_flag(parser)
    args = parser.parse_args()
    config = update_config(get_config(), args)
    if environment_number('PADDLE_TRAINERS_NUM', 1) > 1:
        raise UserError('a launcher started several processes, but main_single_gpu.py runs only one: launch '
                        'main_multi_gpu.py')
    prepare_runtime(args.device)
    import run
    use_device(args.device)
    run.run(config)


if __name__ == '__main__':
    run_program(main)
