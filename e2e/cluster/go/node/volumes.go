// A dynamic volume provisioner for one node: a claim gets a fresh directory, which goes when the claim goes.
//
// StorageClass parameter "size" says what the volume's file system really is:
//
//	(absent)   the node's own disk; the claim's request is not enforced
//	request    a file system exactly as large as the claim asks; growing the claim grows it
//	64Mi       a file system of that size, whatever the claim asks
//
// Level-triggered: every event, and every few seconds, it compares all claims and volumes with what should be.
package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	core "k8s.io/api/core/v1"
	storage "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	storagelisters "k8s.io/client-go/listers/storage/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
	"k8s.io/mount-utils"
)

const (
	provisionerName         = "quire.dev/directory"
	provisionedByAnnotation = "pv.kubernetes.io/provisioned-by"
	selectedNodeAnnotation  = "volume.kubernetes.io/selected-node"
	sizeParameter           = "size"
	sizeOfRequest           = "request"
	resyncPeriod            = 5 * time.Second
)

type provisioner struct {
	client  kubernetes.Interface
	mounter mount.Interface
	root    string
	classes storagelisters.StorageClassLister
	claims  corelisters.PersistentVolumeClaimLister
	volumes corelisters.PersistentVolumeLister
}

func newVolumeProvisionerCommand() *cobra.Command {
	var kubeconfig, root string
	command := &cobra.Command{
		Use:          "volume-provisioner",
		SilenceUsage: true,
		RunE: func(command *cobra.Command, _ []string) error {
			return runProvisioner(command.Context(), kubeconfig, root)
		},
	}
	command.Flags().StringVar(&kubeconfig, "kubeconfig", "", "how to reach the API server")
	command.Flags().StringVar(&root, "root", "", "directory that holds the volumes")
	return command
}

func runProvisioner(ctx context.Context, kubeconfig, root string) error {
	if ctx == nil {
		ctx = context.Background()
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	factory := informers.NewSharedInformerFactory(client, 0)
	p := &provisioner{
		client:  client,
		mounter: mount.New(""),
		root:    root,
		classes: factory.Storage().V1().StorageClasses().Lister(),
		claims:  factory.Core().V1().PersistentVolumeClaims().Lister(),
		volumes: factory.Core().V1().PersistentVolumes().Lister(),
	}
	changed := make(chan struct{}, 1)
	notify := func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	handler := cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { notify() },
		UpdateFunc: func(any, any) { notify() },
		DeleteFunc: func(any) { notify() },
	}
	for _, informer := range []cache.SharedIndexInformer{
		factory.Storage().V1().StorageClasses().Informer(),
		factory.Core().V1().PersistentVolumeClaims().Informer(),
		factory.Core().V1().PersistentVolumes().Informer(),
	} {
		if _, err := informer.AddEventHandler(handler); err != nil {
			return err
		}
	}
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	ticker := time.NewTicker(resyncPeriod)
	defer ticker.Stop()
	for {
		p.reconcile(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-ticker.C:
		}
	}
}

func (p *provisioner) reconcile(ctx context.Context) {
	claims, _ := p.claims.List(labels.Everything())
	for _, claim := range claims {
		class := p.classOf(claim)
		if class == nil || claim.DeletionTimestamp != nil {
			continue
		}
		var err error
		switch {
		case claim.Status.Phase == core.ClaimBound:
			err = p.grow(ctx, claim, class)
		case claim.Spec.VolumeName == "" && isDue(claim, class):
			err = p.provision(ctx, claim, class)
		}
		if err != nil && !apierrors.IsAlreadyExists(err) && !apierrors.IsConflict(err) {
			klog.ErrorS(err, "Claim not served", "claim", klog.KObj(claim))
		}
	}
	volumes, _ := p.volumes.List(labels.Everything())
	for _, volume := range volumes {
		if isUnused(volume) {
			if err := p.remove(ctx, volume); err != nil && !apierrors.IsNotFound(err) {
				klog.ErrorS(err, "Volume not removed", "volume", volume.Name)
			}
		}
	}
}

func (p *provisioner) classOf(claim *core.PersistentVolumeClaim) *storage.StorageClass {
	if claim.Spec.StorageClassName == nil {
		return nil
	}
	class, err := p.classes.Get(*claim.Spec.StorageClassName)
	if err != nil || class.Provisioner != provisionerName {
		return nil
	}
	return class
}

// isDue tells whether a claim may be served now, or waits for the scheduler to choose a node for its pod.
func isDue(claim *core.PersistentVolumeClaim, class *storage.StorageClass) bool {
	waits := class.VolumeBindingMode != nil && *class.VolumeBindingMode == storage.VolumeBindingWaitForFirstConsumer
	return !waits || claim.Annotations[selectedNodeAnnotation] != ""
}

func isUnused(volume *core.PersistentVolume) bool {
	return volume.Annotations[provisionedByAnnotation] == provisionerName &&
		volume.Status.Phase == core.VolumeReleased &&
		volume.Spec.PersistentVolumeReclaimPolicy == core.PersistentVolumeReclaimDelete
}

func (p *provisioner) provision(ctx context.Context, claim *core.PersistentVolumeClaim, class *storage.StorageClass) error {
	name := "pvc-" + string(claim.UID)
	request := claim.Spec.Resources.Requests[core.ResourceStorage]
	directory := filepath.Join(p.root, name)
	if err := os.MkdirAll(directory, 0o777); err != nil {
		return err
	}
	if size, limited := fileSystemSize(class, request); limited {
		if err := p.mountOfSize(directory, size); err != nil {
			return err
		}
	}
	// fsGroup does not apply to host paths: a pod that is not root needs the mode, which umask has narrowed.
	if err := os.Chmod(directory, 0o777); err != nil {
		return err
	}
	directoryType := core.HostPathDirectory
	volume := &core.PersistentVolume{
		ObjectMeta: meta.ObjectMeta{Name: name, Annotations: map[string]string{provisionedByAnnotation: provisionerName}},
		Spec: core.PersistentVolumeSpec{
			Capacity:         core.ResourceList{core.ResourceStorage: request},
			AccessModes:      claim.Spec.AccessModes,
			VolumeMode:       claim.Spec.VolumeMode,
			StorageClassName: class.Name,
			// The annotation keeps the volume controller away: a released volume is removed here.
			PersistentVolumeReclaimPolicy: *class.ReclaimPolicy,
			PersistentVolumeSource: core.PersistentVolumeSource{
				HostPath: &core.HostPathVolumeSource{Path: directory, Type: &directoryType},
			},
			ClaimRef: &core.ObjectReference{
				APIVersion: "v1", Kind: "PersistentVolumeClaim",
				Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID,
			},
		},
	}
	_, err := p.client.CoreV1().PersistentVolumes().Create(ctx, volume, meta.CreateOptions{})
	return err
}

func (p *provisioner) grow(ctx context.Context, claim *core.PersistentVolumeClaim, class *storage.StorageClass) error {
	request := claim.Spec.Resources.Requests[core.ResourceStorage]
	if request.Cmp(claim.Status.Capacity[core.ResourceStorage]) <= 0 {
		return nil
	}
	volume, err := p.volumes.Get(claim.Spec.VolumeName)
	if err != nil {
		return err
	}
	if size, limited := fileSystemSize(class, request); limited {
		if err := p.mountOfSize(volume.Spec.HostPath.Path, size); err != nil {
			return err
		}
	}
	volume = volume.DeepCopy()
	volume.Spec.Capacity[core.ResourceStorage] = request
	if _, err := p.client.CoreV1().PersistentVolumes().Update(ctx, volume, meta.UpdateOptions{}); err != nil {
		return err
	}
	claim = claim.DeepCopy()
	claim.Status.Capacity[core.ResourceStorage] = request
	_, err = p.client.CoreV1().PersistentVolumeClaims(claim.Namespace).UpdateStatus(ctx, claim, meta.UpdateOptions{})
	return err
}

func (p *provisioner) remove(ctx context.Context, volume *core.PersistentVolume) error {
	if volume.DeletionTimestamp != nil {
		return nil
	}
	directory := volume.Spec.HostPath.Path
	if mounted, err := p.mounter.IsMountPoint(directory); err == nil && mounted {
		if err := p.mounter.Unmount(directory); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(directory); err != nil {
		return err
	}
	return p.client.CoreV1().PersistentVolumes().Delete(ctx, volume.Name, meta.DeleteOptions{})
}

func fileSystemSize(class *storage.StorageClass, request resource.Quantity) (resource.Quantity, bool) {
	switch parameter := class.Parameters[sizeParameter]; parameter {
	case "":
		return resource.Quantity{}, false
	case sizeOfRequest:
		return request, true
	default:
		size, err := resource.ParseQuantity(parameter)
		if err != nil {
			klog.ErrorS(err, "StorageClass parameter is no quantity; using the request", "class", class.Name)
			return request, true
		}
		return size, true
	}
}

// mountOfSize mounts a memory file system of the size, or resizes the one that is there.
func (p *provisioner) mountOfSize(directory string, size resource.Quantity) error {
	options := fmt.Sprintf("size=%d,mode=0777", size.Value())
	mounted, err := p.mounter.IsMountPoint(directory)
	if err != nil {
		return err
	}
	if mounted {
		options = "remount," + options
	}
	output, err := exec.Command("mount", "-t", "tmpfs", "-o", options, "tmpfs", directory).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mount %s: %w: %s", directory, err, output)
	}
	return nil
}
