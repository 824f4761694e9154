"""JSON schemas of what deploy/kubernetes uses of four projects' formats, in their own names; anything else is an error.

Written for these files, not taken from the projects. Pod templates inside are left open here: kubernetes-validate has the
real schema of a Pod.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
POSITIVE: Schema = {"type": "integer", "minimum": 1}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+([KMGT]i?)?$"}
OPEN: Schema = {"type": "object"}


def record(required: dict[str, Schema], **optional: Schema) -> Schema:
    properties = required | optional
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def several(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


def resource(version: str, kind: str, spec: Schema) -> Schema:
    metadata = record({"name": TEXT}, annotations={"type": "object", "additionalProperties": TEXT})
    return record({"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": metadata, "spec": spec})


POD_TEMPLATE = record({"spec": OPEN}, metadata=OPEN)

# serving.kserve.io/v1beta1: a predictor is a Pod's spec with fields of KServe beside it.
PREDICTOR_OWN = {"minReplicas": COUNT, "maxReplicas": POSITIVE}
INFERENCE_SERVICE = resource(
    "serving.kserve.io/v1beta1",
    "InferenceService",
    record({"predictor": {"type": "object", "properties": PREDICTOR_OWN, "required": ["containers"]}}),
)

LEADER_WORKER_SET = resource(
    "leaderworkerset.x-k8s.io/v1",
    "LeaderWorkerSet",
    record(
        {
            "replicas": COUNT,
            "leaderWorkerTemplate": record(
                {"size": POSITIVE, "leaderTemplate": POD_TEMPLATE, "workerTemplate": POD_TEMPLATE},
                restartPolicy={"enum": ["Default", "RecreateGroupOnPodRestart", "None"]},
            ),
        }
    ),
)

_START = {"type": "object", "additionalProperties": {"type": "string"}}
_HEAD = record({"rayStartParams": _START, "template": POD_TEMPLATE})
_WORKERS = record(
    {
        "groupName": TEXT,
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": POSITIVE,
        "rayStartParams": _START,
        "template": POD_TEMPLATE,
    }
)
RAY_SERVICE = resource(
    "ray.io/v1",
    "RayService",
    record({"serveConfigV2": TEXT, "rayClusterConfig": record({"headGroupSpec": _HEAD, "workerGroupSpecs": several(_WORKERS)})}),
)
# Of Ray Serve, not of KubeRay, which carries it as text.
RAY_APPLICATIONS = record(
    {
        "applications": several(
            record(
                {
                    "name": TEXT,
                    "import_path": {"const": "ray.serve.llm:build_openai_app"},
                    "route_prefix": {"type": "string", "pattern": "^/"},
                    "args": record(
                        {
                            "llm_configs": several(
                                record(
                                    {
                                        "model_loading_config": record({"model_id": TEXT, "model_source": TEXT}),
                                        "engine_kwargs": OPEN,
                                    },
                                    deployment_config=record({"num_replicas": POSITIVE}),
                                )
                            )
                        }
                    ),
                }
            )
        )
    }
)

# The production-stack chart's values. A probe of the chart has these fields only.
_PROBE = record(
    {"httpGet": record({"path": {"type": "string", "pattern": "^/"}, "port": POSITIVE})},
    initialDelaySeconds=COUNT,
    periodSeconds=POSITIVE,
    failureThreshold=POSITIVE,
)
PRODUCTION_STACK = record(
    {
        "servingEngineSpec": record(
            {
                "containerPort": POSITIVE,
                "startupProbe": _PROBE,
                "readinessProbe": _PROBE,
                "livenessProbe": _PROBE,
                "securityContext": OPEN,
                "containerSecurityContext": OPEN,
                "modelSpec": several(
                    record(
                        {
                            "name": TEXT,
                            "repository": TEXT,
                            "tag": TEXT,
                            "modelURL": TEXT,
                            "replicaCount": COUNT,
                            "requestCPU": POSITIVE,
                            "requestMemory": QUANTITY,
                            "requestGPU": POSITIVE,
                            "pvcStorage": QUANTITY,
                            "pvcAccessMode": several({"enum": ["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"]}),
                            "env": several(record({"name": TEXT, "value": TEXT})),
                            "vllmConfig": record({"enablePrefixCaching": {"type": "boolean"}, "extraArgs": several(TEXT)}),
                        }
                    )
                ),
            }
        )
    }
)
