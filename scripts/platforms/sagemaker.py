"""tpengine serve on SageMaker: the calls that make an endpoint from an image and a model in S3.

    python3 sagemaker.py --name tpengine --image ACCOUNT.dkr.ecr.REGION.amazonaws.com/tpengine:0.1 --role ARN --model s3://BUCKET/llama-70b-tp4/

The model is a prefix that holds shards (best: nothing is cut at the start) or a checkpoint; it appears in /opt/ml/model. SageMaker starts the image with
the word "serve", which the entrypoint turns into --sagemaker: /ping and /invocations on port 8080. Needs the package boto3.
"""
import argparse


def requests(args):
    """What create_model, create_endpoint_config and create_endpoint are called with."""
    environment = {"SM_NUM_GPUS": str(args.gpus), "SHARD_DIR": "/tmp/tpengine-shards", "OPENAI_SERVED_MODEL_NAME_OVERRIDE": args.name}
    source = {"S3DataSource": {"S3Uri": args.model, "S3DataType": "S3Prefix", "CompressionType": "None"}}
    variant = {"VariantName": "all", "ModelName": args.name, "InstanceType": args.instance, "InitialInstanceCount": 1,
               "ModelDataDownloadTimeoutInSeconds": 3600, "ContainerStartupHealthCheckTimeoutInSeconds": args.startup}
    return (
        ("create_model", {"ModelName": args.name, "ExecutionRoleArn": args.role,
                          "PrimaryContainer": {"Image": args.image, "ModelDataSource": source, "Environment": environment}}),
        ("create_endpoint_config", {"EndpointConfigName": args.name, "ProductionVariants": [variant]}),
        ("create_endpoint", {"EndpointName": args.name, "EndpointConfigName": args.name}),
    )


def arguments(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--role", required=True)
    parser.add_argument("--model", required=True, help="s3://... with a / at its end")
    parser.add_argument("--instance", default="ml.g5.12xlarge")
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--startup", type=int, default=1800, help="seconds that a start may take, 60 to 3600")
    return parser.parse_args(words)


def main():
    import boto3

    client = boto3.client("sagemaker")
    for call, request in requests(arguments()):
        print(call, getattr(client, call)(**request))


if __name__ == "__main__":
    main()
