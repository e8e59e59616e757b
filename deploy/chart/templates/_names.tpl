{{- define "csi.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- /* The reference chart's rule, so that an upgrade finds the objects that are there. */}}
{{- define "csi.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{- /* Immutable in a Deployment and a DaemonSet: (dict "root" $ "component" "node") */}}
{{- define "csi.selector" -}}
app.kubernetes.io/name: {{ include "csi.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "csi.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/name: {{ include "csi.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "csi.account" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "csi.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{- /* The newest set of sidecars that this Kubernetes can run, as YAML. */}}
{{- define "csi.sidecars" -}}
{{- $sets := (.Files.Get "files/images.yaml" | fromYaml).sidecars -}}
{{- if semverCompare ">=1.34.0-0" .Capabilities.KubeVersion.Version -}}
{{- get $sets "1.34" | toYaml -}}
{{- else -}}
{{- get $sets "1.30" | toYaml -}}
{{- end -}}
{{- end }}

{{- /* An image of ours: (dict "root" $ "name" "controller" "given" .Values.controller.plugin.image). The reference driver's repository and its tags name
another program, so they have no effect (NOTES.txt says so). */}}
{{- define "csi.image" -}}
{{- $ours := get (.root.Files.Get "files/images.yaml" | fromYaml).driver .name -}}
{{- $repository := default "" .given.repository -}}
{{- if hasPrefix "ghcr.io/sergelogvinov/" $repository -}}{{- $repository = "" -}}{{- end -}}
{{- $tag := default "" .given.tag -}}
{{- if .given.digest -}}
{{- printf "%s%s@%s" (default $ours.repository $repository) (empty $tag | ternary "" (printf ":%s" $tag)) .given.digest -}}
{{- else if and $repository $tag (ne $tag $ours.tag) -}}
{{- fail (printf "%s.plugin.image.tag: this chart runs %s of the driver; for %q in %s give %s.plugin.image.digest too" .name $ours.tag $tag $repository .name) -}}
{{- else -}}
{{- printf "%s:%s@%s" (default $ours.repository $repository) $ours.tag $ours.digest -}}
{{- end -}}
{{- end }}

{{- /* A sidecar's: (dict "root" $ "name" "attacher" "given" .Values.controller.attacher.image) */}}
{{- define "csi.sidecar" -}}
{{- $name := .name -}}
{{- $ours := get (include "csi.sidecars" .root | fromYaml) $name -}}
{{- $repository := default $ours.repository .given.repository -}}
{{- $tag := default $ours.tag .given.tag -}}
{{- $digest := default "" .given.digest -}}
{{- if not $digest -}}
{{- range (.root.Files.Get "files/images.yaml" | fromYaml).sidecars -}}
{{- $known := get . $name -}}
{{- if eq $known.tag $tag -}}{{- $digest = $known.digest -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- printf "%s:%s%s" $repository $tag (empty $digest | ternary "" (printf "@%s" $digest)) -}}
{{- end }}

{{- /* Our arguments, each unless one of its name is given, then those given: (dict "ours" list "given" list) */}}
{{- define "csi.arguments" -}}
{{- $given := default list .given -}}
{{- $names := list -}}
{{- range $given }}{{- $names = append $names (. | trimPrefix "-" | trimPrefix "-" | splitList "=" | first) -}}{{- end -}}
{{- range .ours }}
{{- if not (has (. | trimPrefix "-" | trimPrefix "-" | splitList "=" | first) $names) }}
- {{ . | quote }}
{{- end }}
{{- end }}
{{- range $given }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{- /* A cluster with a cloud controller taints new nodes until that has seen them; it may need a volume of ours itself. (dict "given" list) */}}
{{- define "csi.tolerations" -}}
{{- $given := default list .given -}}
{{- $all := false -}}
{{- range $given }}{{- if and (eq (default "" .operator) "Exists") (not .key) (not .effect) }}{{- $all = true }}{{- end }}{{- end -}}
{{- if not $all -}}
{{- $given = append $given (dict "key" "node.cloudprovider.kubernetes.io/uninitialized" "operator" "Exists" "effect" "NoSchedule") -}}
{{- end -}}
{{- toYaml $given -}}
{{- end }}
