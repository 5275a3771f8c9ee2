"""Mistakes in the templates of the chart that its tests must find."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """A change of one file of the chart, and what must be said about it."""

    file: str
    old: str
    new: str
    problem: str
    preset: str = "fleet"


MISTAKES = [
    Mistake("api.yaml", "path: /live", "path: /healthz", "the server has no /healthz"),
    Mistake("api.yaml", "path: /live", "path: /health", "must not depend on Redis, the queue or engines"),
    Mistake("api.yaml", "port: http }\n            periodSeconds: 2", "port: web }", "there is no port web"),
    Mistake("api.yaml", 'GLIMMER_PORT, value: "8000"', 'GLIMMER_PORT, value: "9000"', "listens on 9000"),
    Mistake("api.yaml", "name: GLIMMER_HOST", "name: GLIMMER_ADDRESS", "GLIMMER_ADDRESS is not a setting of api"),
    Mistake("api.yaml", "add $api.graceSeconds 15", "$api.graceSeconds", "is killed before its drain"),
    Mistake("api.yaml", '"GLIMMER_SCALE_TO_ZERO" "true"', '"GLIMMER_SCALE_TO_ZERO" "false"', "no job is accepted"),
    Mistake("api.yaml", "args: [api]", "args: [serve-api]", "there is no command serve-api"),
    Mistake("api.yaml", "mountPath: /tmp", "mountPath: /temp", "cannot write to {'/tmp'}"),
    Mistake("api.yaml", "name: http, containerPort", "name: web, containerPort", "has no port http"),
    Mistake("api.yaml", "maxSurge: 1, maxUnavailable: 0", "maxSurge: 0, maxUnavailable: 1", "stops a pod before"),
    Mistake("engine.yaml", "add $engine.graceSeconds 15", "sub $engine.graceSeconds 1", "is killed before its drain"),
    Mistake("engine.yaml", "[glimmer, health, --engine]", "[glimmer, health, --engines]", "livenessProbe: glimmer"),
    Mistake("engine.yaml", "[glimmer, health, --engine]", "[glimmer, health]", "a probe asks for an API"),
    Mistake("engine.yaml", "[glimmer, health, --engine, --ready]", "[glimmer, health, --engine]", "counts as ready"),
    Mistake("engine.yaml", "[glimmer, health, --engine]", "[glimmer, health, --engine, --ready]", "would be killed"),
    Mistake("engine.yaml", '"GLIMMER_STAGE" $stage', '"GLIMMER_STAGES" $stage', "GLIMMER_STAGES is not a setting"),
    Mistake("engine.yaml", '"GLIMMER_STAGE" $stage', '"GLIMMER_STAGE" "draw"', "the engine refuses its settings"),
    Mistake("engine.yaml", '"GLIMMER_REDIS_URL" false', '"GLIMMER_REDIS" false', "GLIMMER_REDIS is not a setting"),
    Mistake("engine.yaml", "  {{- if not $scaled }}\n  replicas:", "  {{- if true }}\n  replicas:", "undo the scaling"),
    Mistake("engine.yaml", "{ maxSurge: 0, maxUnavailable: 1 }", "{ maxSurge: 1, maxUnavailable: 0 }", "for a GPU"),
    Mistake("engine.yaml", "max $engine.autoscaling.cooldownSeconds $engine.startupSeconds", "300", "loaded"),
    Mistake("engine.yaml", 'activationThreshold: "0"', 'activationThreshold: "1"', "one job does not start an engine"),
    Mistake("engine.yaml", 'ignoreNullValues: "false"', 'ignoreNullValues: "true"', "count as an empty queue"),
    Mistake("engine.yaml", "minReplicaCount", "minReplicas", "has fields that its schema does not know"),
    Mistake("engine.yaml", "name: cache, mountPath", "name: caches, mountPath", "mounts of unknown volumes"),
    Mistake("engine.yaml", "mountPath: /var/cache/glimmer", "mountPath: /cache", "cannot write to"),
    Mistake(
        "engine.yaml",
        "mountPath: /models, readOnly",
        "mountpath: /models, readOnly",
        "'mountPath' is",
    ),
    Mistake("_helpers.tpl", "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "has a writable root"),
    Mistake("_helpers.tpl", "runAsUser: {{ .user }}", "runAsUser: 0", "may run as root"),
    Mistake("_helpers.tpl", "  runAsUser: {{ .user }}\n", "", "may run as root"),
    Mistake("_helpers.tpl", "capabilities: { drop: [ALL] }", "capabilities: {}", "has capabilities"),
    Mistake("_helpers.tpl", "allowPrivilegeEscalation: false\n", "allowPrivilegeEscalation: true\n", "gain privileges"),
    Mistake("_helpers.tpl", "  seccompProfile: { type: RuntimeDefault }\n", "", "has no seccomp profile"),
    Mistake("_helpers.tpl", "enableServiceLinks: false\n", "", "gets variables of Services"),
    Mistake("_helpers.tpl", "automountServiceAccountToken: false\n", "", "gets a token of the cluster"),
    Mistake("_helpers.tpl", "shareProcessNamespace: true\n", "", "ignores SIGTERM"),
    Mistake("_helpers.tpl", "app.kubernetes.io/component: {{ .component }}\n", "", "selects the pods of"),
    Mistake("_helpers.tpl", "glimmer_stage_backlog{", "glimmer_backlog{", "there is no metric glimmer_backlog"),
    Mistake("_helpers.tpl", 'stage="{{ .stage }}"', 'stage="x{{ .stage }}"', "no sample of"),
    Mistake("_helpers.tpl", '"job=\\"%s/%s\\""', '"job=\\"%s-%s\\""', "selects nothing that is scraped"),
    Mistake(
        "_helpers.tpl",
        "      matchLabels:\n        {{- include",
        "      matchLabel:\n        {{- include",
        "matchLabel",
    ),
    Mistake("_helpers.tpl", "kind: PodDisruptionBudget", "kind: PodDisruptionBudgets", "PodDisruptionBudgets"),
    Mistake("network.yaml", "- { protocol: UDP, port: 53 }", "- { protocol: UDP, port: 54 }", "cannot resolve names"),
    Mistake("network.yaml", "port: {{ . }} }", "port: 1{{ . }} }", "cannot reach Redis"),
    Mistake("network.yaml", "port: 8000", "port: 8080", "nobody can reach it"),
    Mistake("network.yaml", '"component" "redis") | nindent 14', '"component" "db") | nindent 14', "reach", "laptop"),
    Mistake("network.yaml", "[Ingress, Egress]\n  egress", "[Egress]\n  egress", "can be reached"),
    Mistake("network.yaml", "request: {{ .Values", "request: 3{{ 0 }}s #{{ .Values", "may still run"),
    Mistake("network.yaml", 'proxy-buffering: "off"', 'proxy-buffering: "on"', "collects events", "single-gpu"),
    Mistake("network.yaml", "proxy-read-timeout", "read-timeout", "may still run", "single-gpu"),
    Mistake("network.yaml", "        - name: {{ $name }}\n", "        - name: {{ $name }}-api\n", "no port 8000 of"),
    Mistake("network.yaml", "port: { name: http }", "port: { name: https }", "there is no port https", "single-gpu"),
    Mistake("monitoring.yaml", '"component" "api"', '"component" "web"', "PodMonitor glimmer selects no pod"),
    Mistake("monitoring.yaml", "port: http", "port: metrics", "has no port metrics"),
    Mistake("monitoring.yaml", "podMetricsEndpoints", "podMetricEndpoints", "has fields that its schema does not know"),
    Mistake("monitoring.yaml", "toYaml . | nindent 10", 'omit . "for" | toYaml | nindent 10', "differs from"),
    Mistake("redis.yaml", "GLIMMER_REDIS_URL: redis", "REDIS_URL: redis", "has no GLIMMER_REDIS_URL", "laptop"),
    Mistake("redis.yaml", "mountPath: /data", "mountPath: /redis", "cannot write to {'/data'}", "laptop"),
    Mistake("redis.yaml", "targetPort: redis", "targetPort: db", "has no port db", "laptop"),
]
